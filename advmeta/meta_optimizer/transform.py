"""The meta-optimizer as an optax transformation."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_leaves_with_path
from jax.typing import ArrayLike
from optax._src.base import NO_PARAMS_MSG  # optax's own words; not exported

from advmeta.meta_optimizer import features, fused, inputs, rule
from advmeta.meta_optimizer.features import Aim
from advmeta.meta_optimizer.layers import layer_positions
from advmeta.meta_optimizer.lstm import LSTM, Linear, Memory, flatten
from advmeta.meta_optimizer.rule import MetaOptimizerConfig
from advmeta.types import Array, Key, MetaParams, Params, PyTree

# The linear map has few weights, which say much of the whole training: a step of meta-training, and
# a perturbation of evolution strategies, moves it by so much more.
LINEAR_SCALE = 6
SHORT_ROW = 32  # coordinates


class ScaleByMetaOptimizerState(NamedTuple):
    """Param-shaped trees, one a field: mu and nu are sharded as the parameter, and the memory is
    where its leading axis is not split."""

    count: ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]  # shape=(), int32.
    mu: PyTree  # Adam's moments; None where the features do not use them.
    nu: PyTree
    memory: tuple[Memory, ...]  # one a layer; each field is a tree of (hidden,) + p.shape.


def scale_by_meta_optimizer(
    meta_params: MetaParams,
    config: MetaOptimizerConfig = MetaOptimizerConfig(),
    aim: Aim = Aim(),
    *,
    kernel: Literal["xla", "pallas"] = "xla",
) -> optax.GradientTransformationExtraArgs:
    """The update that a coordinate-wise LSTM makes of a gradient.

    It descends: no learning rate and no `optax.scale` by -1 follow it.

    ``a, c, b = LSTM_phi(features(g, theta)) + 6 (V_phi s, 0)``  for each coordinate, with s what
    rows and tensors share, and

    ``u = eta_t ( shift tanh(b) - exp(2 tanh(a)) d - lambda nu exp(2 tanh(c)) n )``,
    ``d = m_hat / (v_hat^p mean(v_hat)^(1/2 - p) + eps)``

    where m_hat and v_hat are Adam's moments of
    ``g + min(lambda mu, 0.3 rms(g) / rms) exp(2 tanh(6 v_phi s)) theta``, n is the gradient, in
    units of its RMS, of the norm of the model's Jacobian without its activations
    (`jacobian.gain`), and rms is that of theta's tensor. ``lambda = r / (1 + r)``, where r =
    epsilon times that norm is how many nats the adversary moves a logit by; the pull has a factor
    ``rms / (rms + 4 eta)``, too.

    Each term is there if the features show what it is made of: d with "adam", the pull with
    "jacobian", lambda, else 1, with "reach". A readout of zero is the nominal rule, Adam (where p
    is 1/2) with L2 regularisation and the pull, and the factors cannot take it further than a
    fixed one away.

    To first order the Jacobian is what an adversary adds to the loss, in linf by the 1-norm of its
    columns (Goodfellow et al. 2015, section 5, for a linear model). Biases and scales, leaves of
    rank 1 and 0, are not pulled. In a model with scales mu and nu are a tenth of the config's, and
    r is 1.

    It takes what it is given for the whole model: layers that a mask hides from it (`optax.masked`)
    are not in the Jacobian. To freeze some, mask what comes out.

    Args:
      meta_params: phi, from `init_meta_params`, `meta_train` or a file. To train them, build the
        transformation inside the function that is differentiated.
      config: the one they were made with.
      aim: norm, epsilon and horizon, for those with the features "aim", "reach" and "time"; may be
        traced.
      kernel: what takes the LSTM's step: "xla", or "pallas", one kernel for all layers, `fused`,
        which on an H200 was no faster. It is for NVIDIA's and for arrays that are not sharded; a
        CPU interprets it, slowly.

    Returns:
      An optax transformation. Its ``update`` takes ``params`` where the features look at them, and
      where one looks at the loss, ``value``, that whose gradient it is given: without it, that
      feature is zero, as it is at 0.27 of the loss of a guess.

    Raises:
      ValueError: shapes of ``meta_params`` that do not fit ``config``, a norm that it does not
        know, another kernel, or, from ``update``, no ``params`` where they are needed.

    Example:
      >>> config = MetaOptimizerConfig()
      >>> meta_params = init_meta_params(config, jax.random.key(0))
      >>> optimizer = optax.chain(
      ...     optax.clip_by_global_norm(1.0), scale_by_meta_optimizer(meta_params, config))
      >>> params = {"w": jnp.ones((3, 2))}
      >>> state = optimizer.init(params)
      >>> updates, state = jax.jit(optimizer.update)({"w": jnp.ones((3, 2))}, state, params)
      >>> updates["w"].shape
      (3, 2)

    Reference:
      Andrychowicz et al. 2016, section 2.1 (arXiv:1606.04474) for the LSTM; a nominal term with
      decay as in Harrison et al. 2022 (arXiv:2209.11208); the pull in its place after Goodfellow
      et al. 2015 (arXiv:1412.6572).
    """
    check_meta_params(meta_params, config)
    if {"aim", "jacobian", "reach"} & set(config.features):
        features.check_aim(aim)
    if kernel not in ("xla", "pallas"):
        raise ValueError(f"kernel={kernel!r} is unknown: write 'xla' or 'pallas'")
    lstm, linear = _networks(config)

    def init_fn(params: Params) -> ScaleByMetaOptimizerState:
        # Each has its own arrays: a buffer that is in the state twice cannot be donated.
        mu, nu = (_zeros(params) if "adam" in config.features else None for _ in range(2))
        short = jnp.bfloat16 if config.memory_dtype == "bfloat16" else None
        memory = tuple(
            Memory(_zeros(params, n, dtype=short), _zeros(params, n, dtype=short))
            for n in config.hidden
        )
        return ScaleByMetaOptimizerState(jnp.zeros([], jnp.int32), mu, nu, memory)

    def update_fn(updates, state, params=None, *, value=None, **extra_args):
        del extra_args
        if params is None and config.needs_params:
            raise ValueError(NO_PARAMS_MSG)
        updates = jax.tree.map(_real, updates)
        gradient = jax.tree.map(at_least_float32, jax.lax.stop_gradient(updates))
        leaves, treedef = jax.tree.flatten(gradient)
        positions = layer_positions(gradient)
        parameters = _leaves(params, treedef)
        reach, pulls = inputs.look_at_jacobian(config.features, aim, parameters, positions)
        loss = None if value is None else jnp.asarray(jax.lax.stop_gradient(value), jnp.float32)
        situation = inputs.situation(config.features, aim, state.count, reach, loss, positions)
        tensors = zip(parameters, leaves, positions, strict=True)
        shared = [inputs.share(config.features, *tensor, situation) for tensor in tensors]
        offsets: list[Any] = [
            LINEAR_SCALE * linear.apply({"params": meta_params.get("linear", {})}, s)
            for s in shared
        ]
        strength = rule.strength(config, positions, reach)
        regularised = rule.regularise(config, leaves, parameters, offsets, strength)
        count = optax.safe_increment(state.count)
        (mu, nu), direction, normalised = rule.adam(
            config, (state.mu, state.nu), count, gradient, treedef.unflatten(regularised)
        )
        columns = [_leaves(tree, treedef) for tree in (direction, normalised)]
        tensors = map(inputs.Coordinates, leaves, *columns, parameters, pulls, positions)
        pace = rule.pace(config, aim, state.count)
        memories = _split_memory(state.memory, treedef)
        # A product of constants and of features side by side XLA would take apart into one for
        # each feature: to it these are no constants.
        weights = jax.lax.optimization_barrier(meta_params["lstm"])
        stepped: list[tuple[Array, Any]] = [
            update_tensor(weights, *columns, pace, strength)
            for columns in zip(tensors, shared, offsets, memories, strict=True)
        ]
        new_updates = treedef.unflatten([u for u, _ in stepped])
        new_updates = jax.tree.map(lambda u, g: u.astype(g.dtype), new_updates, updates)
        memory = _join_memory([m for _, m in stepped], treedef, len(config.hidden))
        return new_updates, ScaleByMetaOptimizerState(count, mu, nu, memory)

    def update_tensor(
        weights: MetaParams,
        tensor: inputs.Coordinates,
        shared: tuple[Array, ...],
        offset: Array,
        memory: tuple[Memory, ...],
        pace: Array,
        strength: Array,
    ):
        own, wide = inputs.see(config.features, tensor), jax.tree.map(at_least_float32, memory)
        if kernel == "pallas" and tensor.gradient.size:  # no grid without a block
            readout, updated = fused.apply(weights, own, shared, wide)
        else:
            seen = (own, shared, wide)
            if _has_short_rows(tensor.gradient):
                seen = jax.tree.map(functools.partial(flatten, tensor.gradient.shape), seen)
            found = lstm.apply({"params": weights}, *seen)
            readout, updated = jax.tree.map(
                lambda a: a.reshape(a.shape[0], *tensor.gradient.shape), found
            )
        updated = jax.tree.map(lambda new, old: new.astype(old.dtype), updated, memory)
        return pace * rule.update_rule(config, readout, offset, tensor, strength), updated

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def init_meta_params(config: MetaOptimizerConfig, key: Key) -> MetaParams:
    """Fresh meta-parameters: the update is then the nominal one."""
    w = jnp.zeros((1, 1))
    position = layer_positions({"w": w})[0]
    tensor = inputs.Coordinates(w, w, w, w, w, position)
    memory = tuple(Memory(jnp.zeros((n, 1, 1)), jnp.zeros((n, 1, 1))) for n in config.hidden)
    lstm, linear = _networks(config)
    situation = inputs.situation(
        config.features, Aim(), jnp.zeros([], jnp.int32), jnp.ones([]), None, [position]
    )
    shared = inputs.share(config.features, w, w, position, situation)
    own = inputs.see(config.features, tensor)
    meta_params = {"lstm": lstm.init(key, own, shared, memory)["params"]}
    if shared:
        meta_params["linear"] = linear.init(key, shared)["params"]
    return optax.tree.cast(meta_params, jnp.float32)  # with x64, too


def _networks(config: MetaOptimizerConfig) -> tuple[LSTM, Linear]:
    """Those of phi. Both have an output for each factor; the LSTM's last is the shift, the linear
    map's last the factor of the regularisation."""
    factors = ("adam" in config.features) + ("jacobian" in config.features)
    return LSTM(config.hidden, factors + 1), Linear(factors + 1)


def is_beyond_nominal(meta_params: MetaParams) -> PyTree:
    """For each leaf whether the nominal rule has it zero: the readout and the linear map."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key == "linear" or path[1].key == "readout", meta_params
    )


def check_meta_params(meta_params: MetaParams, config: MetaOptimizerConfig) -> None:
    """Raises a ValueError that names the first array that does not fit the config."""
    expected = jax.eval_shape(lambda: init_meta_params(config, jax.random.key(0)))
    expected = {jax.tree_util.keystr(k): x.shape for k, x in tree_leaves_with_path(expected)}
    given = {jax.tree_util.keystr(k): jnp.shape(x) for k, x in tree_leaves_with_path(meta_params)}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise ValueError(
                f"meta_params{name} has shape {given.get(name)}, but the config needs "
                f"{expected.get(name)} (None: not there at all); use the config that the weights "
                f"were made with, not {config}"
            )


def _real(x: Any) -> Array:
    """A number as an array, a shape as it is; raises a ValueError if it is complex."""
    x = x if hasattr(x, "dtype") else jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(
            f"a tensor of shape {x.shape} is {x.dtype}: to optimize complex parameters, write "
            "optax.contrib.split_real_and_imaginary(scale_by_meta_optimizer(...))"
        )
    return x


def at_least_float32(x: Array) -> Array:
    """At least float32: a logarithm or a squared gradient in 16 bits loses what matters."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _has_short_rows(x: Array) -> bool:
    """Whether the LSTM had better see the coordinates on one axis than on those of x.

    CPUs run over the last axis, where 20 numbers take as long as 32. But axes that are split over
    devices cannot be merged in place, and only an explicit mesh says here that they are: where
    there are several devices, all axes stay.
    """
    split = jax.device_count() > 1 or any(jax.typeof(x).sharding.spec)
    return x.ndim > 1 and x.shape[-1] < SHORT_ROW and not split


def _zeros(params: Params, *leading: int, dtype: Any = None) -> PyTree:
    """Zeros of leading axes and each parameter's shape, sharded as the parameter is."""

    def zeros(p):
        p = _real(p)
        plain = jnp.zeros_like(p, dtype=dtype or jnp.promote_types(p.dtype, jnp.float32))
        return jnp.broadcast_to(plain, leading + p.shape)

    return jax.tree.map(zeros, params)


def _leaves(tree: PyTree, treedef) -> list:
    if tree is None:
        return [None] * treedef.num_leaves
    return [at_least_float32(_real(leaf)) for leaf in treedef.flatten_up_to(tree)]


def _split_memory(memory: tuple[Memory, ...], treedef) -> list[tuple[Memory, ...]]:
    """From a tree for each layer's h and c to the layers of each tensor."""
    layers = [map(Memory, treedef.flatten_up_to(m.h), treedef.flatten_up_to(m.c)) for m in memory]
    return list(zip(*layers, strict=True))


def _join_memory(tensors: list[tuple[Memory, ...]], treedef, layers: int) -> tuple[Memory, ...]:
    """The inverse of `_split_memory`; right for a tree without tensors, too."""
    return tuple(
        Memory(
            treedef.unflatten([tensor[layer].h for tensor in tensors]),
            treedef.unflatten([tensor[layer].c for tensor in tensors]),
        )
        for layer in range(layers)
    )
