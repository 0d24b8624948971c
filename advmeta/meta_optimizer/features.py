"""What the LSTM sees of a coordinate: its gradient, its parameter and its layer.

Every feature is scale-free or a bounded function of a logarithm, so that a meta-optimizer trained
on one model can be used on another.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from advmeta.meta_optimizer.layers import LayerPosition
from advmeta.types import Array, Norm

# What every optax update is given, and the loss, which it is given where a loop passes it on.
DEFAULT_FEATURES = ("log_sign", "adam", "parameter", "jacobian", "layer", "aim", "reach", "time")
FEATURES = (*DEFAULT_FEATURES, "loss")
TYPICAL_EPSILON = {"linf": 0.1, "l2": 1.0}
TYPICAL_LOSS = 0.3  # of a model that learns, in units of that of a guess
WARM_UP = 40  # inner steps


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


def check_aim(aim: Aim) -> None:
    """Raises a ValueError for a norm that is unknown or an epsilon that is no radius.

    Where epsilon is traced it cannot be looked at.
    """
    check_norm(aim.norm)
    if isinstance(aim.epsilon, Tracer):
        return
    epsilon = np.asarray(aim.epsilon)
    if not (np.isfinite(epsilon).all() and (epsilon >= 0).all()):
        raise ValueError(f"Aim(epsilon={aim.epsilon!r}) must be finite and at least 0")


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
    check_norm(aim.norm)
    relative = jnp.asarray(aim.epsilon, jnp.float32) / TYPICAL_EPSILON[aim.norm]
    return jnp.stack([jnp.float32(aim.norm == "l2"), jnp.log(relative + 1e-3)])


def check_norm(norm: str) -> None:
    if norm not in TYPICAL_EPSILON:
        raise ValueError(
            f"norm={norm!r}: meta-optimizers that see the aim know {list(TYPICAL_EPSILON)}"
        )


def reach_features(reach: Array) -> Array:
    """Log of the nats that the adversary moves a logit by, see `inputs.look_at_jacobian`. [1]"""
    return jnp.log(reach + 1e-2)[None] / 2


def loss_features(loss: Array | None, positions: list[LayerPosition]) -> Array:
    """Log of the loss over 0.3 times that of a guess, ``log k`` of k outputs; 0: not known. [1]

    A loss below zero counts as zero.
    """
    if loss is None:
        return jnp.zeros(1, jnp.float32)
    outputs = [p.fan_out for p in positions if p.last and not p.bias]
    guess = math.log(max([2, *outputs]))
    return jnp.log(jnp.maximum(loss, 0) / (TYPICAL_LOSS * guess) + 0.1)[None]


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
