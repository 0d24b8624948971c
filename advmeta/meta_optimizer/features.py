"""What the LSTM sees of a coordinate: its gradient, its parameter and its layer.

Every feature is scale-free or a bounded function of a logarithm, so that a meta-optimizer trained
on one model can be used on another.
"""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, GetAttrKey
from jax.typing import ArrayLike

from advmeta.types import Array, Norm, Params

FEATURES = ("log_sign", "adam", "parameter", "jacobian", "layer", "aim", "reach", "time")
TYPICAL_EPSILON = {"linf": 0.1, "l2": 1.0}
WARM_UP = 40  # inner steps
_SCALES = ((DictKey("scale"),), (GetAttrKey("scale"),), (GetAttrKey("weight"),))


class Aim(NamedTuple):
    """What a meta-optimizer is told of a training, beside its gradients.

    Attributes:
      epsilon: the radius in which the model is to be robust, in units of what its first layer is
        given. It is a dial: a larger one gives more robust models with less clean accuracy.
      norm: "linf" or "l2".
      horizon: inner steps of the whole training; None: not known.
    """

    epsilon: ArrayLike = 0.1
    norm: Norm = "linf"
    horizon: ArrayLike | None = None


class LayerPosition(NamedTuple):
    """Where a tensor stands in the model and how large it is; known from the tree alone."""

    first: bool
    last: bool
    bias: bool  # by name, or of rank 1 or 0, as scales of normalisation are too
    outputs: int  # the axis of the layer's outputs; the others are inputs and places
    fan_in: int
    fan_out: int
    depth: int = 0  # of its layer, among those that have a kernel
    layers: int = 1  # that have a kernel, in the whole model
    convolutional: bool = False  # the model has a kernel of rank 3 or more
    normalised: bool = False  # the model has scales, which follow a normalisation


def log_sign(gradient: Array, p: float = 10.0) -> Array:
    """The gradient's magnitude on a logarithmic scale, and its sign. [...] -> [2, ...]

    ``(log|g| / p, sign g)  if |g| >= exp(-p),  else  (-1, exp(p) g)``

    Reference:
      Andrychowicz et al. 2016, Learning to learn by gradient descent by gradient descent,
      appendix A. arXiv:1606.04474
    """
    magnitude = jnp.abs(gradient)
    large = magnitude >= math.exp(-p)
    log = jnp.log(jnp.where(large, magnitude, 1.0)) / p
    return jnp.stack(
        [
            jnp.where(large, log, -1.0),
            jnp.where(large, jnp.sign(gradient), math.exp(p) * gradient),
        ]
    )


def root_mean_square(parameter: Array) -> Array:
    """RMS over the whole tensor; 1e-3 where it is zero, as biases are at the start."""
    return jnp.sqrt(jnp.mean(jnp.square(parameter)) + 1e-6)


def parameter_features(parameter: Array) -> Array:
    """The parameter in units of its tensor's RMS. [...] -> [1, ...]"""
    return (parameter / root_mean_square(parameter))[None]


def layer_features(parameter: Array, gradient: Array, position: LayerPosition) -> tuple[Array, ...]:
    """What the coordinate's layer looks like, as three arrays [f, ...] that broadcast to it.

    The tensor: first, last, bias, log fan-in, log fan-out; of its model, log of the layers, whether
    it has convolutions and normalisations; log RMS, log RMS of its gradient. The row (all weights
    of one input) and the column (all weights of one output): mean |parameter| over RMS. A layer in
    the middle is neither first nor last, and not a flag of its own: one that meta-training has
    never seen raised would feed untrained weights to the LSTM.
    """
    rms = root_mean_square(parameter)
    tensor = jnp.array(
        [
            position.first,
            position.last,
            position.bias,
            math.log(position.fan_in) / 10,
            math.log(position.fan_out) / 10,
            math.log(position.layers) / 3,
            position.convolutional,
            position.normalised,
        ],
        jnp.float32,
    )
    scales = jnp.stack([rms, jnp.sqrt(jnp.square(gradient).mean() + 1e-12)])
    tensor = jnp.concatenate([tensor, jnp.log(scales) / 10])
    size = jnp.abs(parameter) / rms
    if position.bias:
        row = column = size.mean(keepdims=True)
    else:
        inputs = tuple(axis for axis in range(parameter.ndim) if axis != position.outputs)
        row = size.mean(axis=position.outputs, keepdims=True)
        column = size.mean(axis=inputs, keepdims=True)
    return over_coordinates(tensor, parameter), row[None], column[None]


def over_coordinates(shared: Array, parameter: Array) -> Array:
    """Features of a whole tensor, [f], so that they broadcast to its coordinates: [f, 1, ...]."""
    return jnp.expand_dims(shared, range(1, 1 + parameter.ndim))


def aim_features(aim: Aim) -> Array:
    """Whether the norm is l2, and log epsilon, zero at what is typical of the norm. [2]

    Raises:
      ValueError: another norm.
    """
    if aim.norm not in TYPICAL_EPSILON:
        raise ValueError(
            f"norm={aim.norm!r}: meta-optimizers that see the aim know {list(TYPICAL_EPSILON)}"
        )
    relative = jnp.asarray(aim.epsilon, jnp.float32) / TYPICAL_EPSILON[aim.norm]
    return jnp.stack([jnp.float32(aim.norm == "l2"), jnp.log(relative + 1e-3)])


def reach_features(reach: Array) -> Array:
    """Log of the nats that the adversary moves a logit by, see `inputs.look_at_jacobian`. [1]"""
    return jnp.log(reach + 1e-2)[None] / 2


def time_features(aim: Aim, count: Array) -> Array:
    """Log of the inner steps so far, whether the horizon is known, and the share left of it. [3]"""
    elapsed = jnp.log1p(jnp.float32(count)) / 10
    if aim.horizon is None:
        return jnp.stack([elapsed, jnp.float32(0), jnp.float32(0)])
    # A horizon of zero says, where it is traced, that it is not known.
    horizon = jnp.asarray(aim.horizon, jnp.float32)
    left = jnp.clip(1 - count / jnp.maximum(horizon, 1), 0, 1)
    known = jnp.float32(horizon > 0)
    return jnp.stack([elapsed, known, known * left])


def warm_up(count: ArrayLike, horizon: ArrayLike | None) -> Array:
    """The share of the step to take, []: it rises to 1 over 40 steps or a fifth of the horizon.

    Adam's first steps are of full length in all weights at once; where inputs are many and all
    positive they kill most units. Ma and Yarats 2021 (arXiv:1910.04209) give the linear form.
    """
    steps = jnp.float32(WARM_UP)
    if horizon is not None:  # of zero: not known
        horizon = jnp.asarray(horizon, jnp.float32)
        steps = jnp.where(horizon > 0, jnp.clip(horizon / 5, 1, WARM_UP), steps)
    return jnp.minimum(1, (jnp.asarray(count, jnp.float32) + 1) / steps)


def layer_positions(params: Params) -> list[LayerPosition]:
    """The position of every leaf, in the order of `jax.tree.leaves`.

    A layer is a set of leaves with the same parent, and layers follow each other as their names
    do, with numbers compared as numbers. First and last are counted over the layers that have a
    kernel, a leaf of rank 2 or more. Its axes are (..., inputs, outputs), but (outputs, inputs,
    ...) where it is the attribute ``weight`` of a module, as in Equinox. A scale is a leaf of rank
    1 with the key ``scale`` (Flax, Haiku) or the attribute ``scale`` or ``weight``.
    """
    leaves = [(_unboxed(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params)]
    parents = [_natural_order(path[:-1]) for path, _ in leaves]
    kernels = sorted({q for q, (_, x) in zip(parents, leaves, strict=True) if jnp.ndim(x) >= 2})
    positions = [
        _position(path, parent, jnp.shape(x), kernels)
        for parent, (path, x) in zip(parents, leaves, strict=True)
    ]
    of_leaves = list(zip(positions, leaves, strict=True))
    convolutional = any(jnp.ndim(x) > 2 and not q.bias for q, (_, x) in of_leaves)
    normalised = any(jnp.ndim(x) == 1 and path[-1:] in _SCALES for _, (path, x) in of_leaves)
    return [p._replace(convolutional=convolutional, normalised=normalised) for p in positions]


def _position(
    path: tuple, parent: tuple, shape: tuple[int, ...], kernels: list[tuple]
) -> LayerPosition:
    name = path[-1:]  # empty for a tree that is one array
    bias = len(shape) < 2 or name in ((GetAttrKey("bias"),), (DictKey("bias"),))
    outputs = 0 if bias or name == (GetAttrKey("weight"),) else len(shape) - 1
    fan_out = math.prod(shape) if bias else shape[outputs]
    return LayerPosition(
        first=bool(kernels) and parent == kernels[0],
        last=bool(kernels) and parent == kernels[-1],
        bias=bias,
        outputs=outputs,
        fan_in=max(1, math.prod(shape) // max(1, fan_out)),
        fan_out=max(1, fan_out),
        depth=kernels.index(parent) if parent in kernels else 0,
        layers=max(1, len(kernels)),
    )


def _unboxed(path: tuple) -> tuple:
    """The path without the ``.value`` of the variable that Flax NNX keeps an array in."""
    return path[:-1] if path and path[-1] == GetAttrKey("value") else path


def _natural_order(path) -> tuple:
    """Sorts layer_10 after layer_2."""
    words = re.split(r"(\d+)", jax.tree_util.keystr(path))
    return tuple((int(w), "") if w.isdigit() else (-1, w) for w in words)
