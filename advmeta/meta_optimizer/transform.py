"""The meta-optimizer as an optax transformation."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_leaves_with_path
from jax.typing import ArrayLike
from optax._src.base import NO_PARAMS_MSG  # optax's own words; not exported

from advmeta.meta_optimizer import features
from advmeta.meta_optimizer.features import Aim
from advmeta.meta_optimizer.lstm import LSTM, Memory
from advmeta.types import Array, Key, MetaParams, Params, PyTree

# Adam's constants (Kingma and Ba 2015, algorithm 1).
B1, B2, EPSILON = 0.9, 0.999, 1e-8
# Weights below this share of their tensor's RMS shrink in proportion, larger ones alike.
SOFTNESS = 0.3


@dataclasses.dataclass(frozen=True)
class MetaOptimizerConfig:
    """What the LSTM sees and how large it is.

    Args:
      hidden: units of each LSTM layer.
      features: of `FEATURES`: "log_sign" (gradient), "adam" (normalised momentum and gradient),
        "parameter" (in units of its tensor's RMS), "layer" (position, fan-in, fan-out, RMS, row
        and column means), "aim" (norm and epsilon), "time" (steps taken and left). "parameter",
        "layer" and regularisation need ``params`` in ``update``.
      learning_rate: eta, the step of the nominal Adam that the LSTM modulates. With the feature
        "time" it falls to zero as a half cosine; a third of it where the horizon is not known.
      regularisation: mu, the L2 regularisation that is a part of Adam's gradient.
      shrinkage: lambda, by how much a step nominally shrinks a weight, in units of its tensor's
        RMS; it falls with eta.
      shift: the largest step that the LSTM can take of its own, in units of eta.
    """

    hidden: tuple[int, ...] = (20, 20)
    features: tuple[str, ...] = features.FEATURES
    learning_rate: float = 0.03
    regularisation: float = 0.01
    shrinkage: float = 0.025
    shift: float = 3.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.features if name not in features.FEATURES]
        if unknown or not self.features:
            raise ValueError(
                f"features={self.features!r}: {unknown or 'none'} cannot be used; the known "
                f"features are {list(features.FEATURES)}, and there must be at least one"
            )
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden={self.hidden!r} must hold the units of one layer or more")

    @property
    def needs_params(self) -> bool:
        regularised = "adam" in self.features and self.regularisation != 0
        return regularised or "parameter" in self.features or "layer" in self.features


class ScaleByMetaOptimizerState(NamedTuple):
    """Param-shaped trees, one a field, so that a parameter's sharding maps onto its state."""

    count: ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]  # shape=(), int32.
    mu: PyTree  # Adam's moments; None where the features do not use them.
    nu: PyTree
    memory: tuple[Memory, ...]  # one a layer; each field is a tree of p.shape + (hidden,).


class _Coordinates(NamedTuple):
    """What is known of the coordinates of one tensor at one step; None: the features hide it."""

    gradient: Array
    direction: Any  # m_hat / (sqrt(v_hat) + eps): Adam's
    normalised: Any  # g / (sqrt(v_hat) + eps)
    parameter: Any
    position: features.LayerPosition


def scale_by_meta_optimizer(
    meta_params: MetaParams,
    config: MetaOptimizerConfig = MetaOptimizerConfig(),
    aim: Aim = Aim(),
) -> optax.GradientTransformationExtraArgs:
    """The update that a coordinate-wise LSTM makes of a gradient; it needs no learning rate.

    ``a, b, c = LSTM_phi(features(g, theta))``  for each coordinate, and

    ``u = eta_t ( shift tanh(b) - exp(2 tanh(a)) m_hat / (sqrt(v_hat) + eps) )
    - lambda_t exp(2 tanh(c)) rms tanh(theta / (0.3 rms))``

    with rms that of theta's tensor, and m_hat and v_hat the moments of ``g + mu theta``.

    Each term is there if the features show what it is made of: Adam's direction with "adam", the
    shrinkage with "parameter". All three are bounded: a readout of zero is Adam with shrinkage,
    and none can take it further than a fixed factor away.

    The shrinkage is the (softened) sign of a weight, as the gradient of an L1 penalty is: that is
    what an adversary in linf adds to the loss of a linear model (Goodfellow et al. 2015, section
    5). Measured by itself it does more for robust accuracy than decay in proportion to the weight.
    Biases and scales, leaves of rank 1 and 0, do not shrink.

    Args:
      meta_params: phi, from `init_meta_params`, `meta_train` or a file. To train them, build the
        transformation inside the function that is differentiated.
      config: the one they were made with.
      aim: norm, epsilon and horizon, for those with the features "aim" and "time"; may be traced.

    Returns:
      An optax transformation. Its ``update`` takes ``params`` where the features look at them.

    Raises:
      ValueError: shapes of ``meta_params`` that do not fit ``config``, or, from ``update``, no
        ``params`` where they are needed.

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
      decay as in Harrison et al. 2022 (arXiv:2209.11208); the sign in its place after Goodfellow
      et al. 2015 (arXiv:1412.6572).
    """
    check_meta_params(meta_params, config)
    lstm = LSTM(config.hidden, _outputs(config))

    def init_fn(params: Params) -> ScaleByMetaOptimizerState:
        # Each has its own arrays: a buffer that is in the state twice cannot be donated.
        mu, nu = (_zeros(params) if "adam" in config.features else None for _ in range(2))
        memory = tuple(Memory(_zeros(params, n), _zeros(params, n)) for n in config.hidden)
        return ScaleByMetaOptimizerState(jnp.zeros([], jnp.int32), mu, nu, memory)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None and config.needs_params:
            raise ValueError(NO_PARAMS_MSG)
        gradient = jax.tree.map(_float32, jax.lax.stop_gradient(updates))
        mu, nu, direction, normalised = _adam(config, state, gradient, params)
        leaves, treedef = jax.tree.flatten(gradient)
        columns = [_leaves(tree, treedef) for tree in (direction, normalised, params)]
        positions = features.layer_positions(gradient)
        tensors = map(_Coordinates, leaves, *columns, positions)
        situation = _situation(config, aim, state.count)
        pace = _pace(config, aim, state.count)
        memories = _split_memory(state.memory, treedef)
        stepped: list[tuple[Array, Any]] = [
            update_tensor(*pair, situation, pace) for pair in zip(tensors, memories, strict=True)
        ]
        new_updates = treedef.unflatten([u for u, _ in stepped])
        new_updates = jax.tree.map(lambda u, g: u.astype(g.dtype), new_updates, updates)
        memory = _join_memory([m for _, m in stepped], treedef, len(config.hidden))
        count = optax.safe_increment(state.count)
        return new_updates, ScaleByMetaOptimizerState(count, mu, nu, memory)

    def update_tensor(tensor: _Coordinates, memory: tuple[Memory, ...], situation, pace):
        own, shared = _see(config, tensor)
        readout, updated = lstm.apply({"params": meta_params}, own, shared + situation, memory)
        return pace * _update_rule(config, readout, tensor), updated

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def init_meta_params(config: MetaOptimizerConfig, key: Key) -> MetaParams:
    """Fresh meta-parameters: the update is then near the nominal one."""
    w = jnp.zeros((1, 1))
    tensor = _Coordinates(w, w, w, w, features.layer_positions({"w": w})[0])
    memory = tuple(Memory(jnp.zeros((1, 1, n)), jnp.zeros((1, 1, n))) for n in config.hidden)
    lstm = LSTM(config.hidden, _outputs(config))
    own, shared = _see(config, tensor)
    shared += _situation(config, Aim(), jnp.zeros([], jnp.int32))
    return lstm.init(key, own, shared, memory)["params"]


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


def _adam(
    config: MetaOptimizerConfig,
    state: ScaleByMetaOptimizerState,
    gradient: optax.Updates,
    params: Params | None,
):
    """Adam's moments, its direction and the gradient in the same units (algorithm 1)."""
    if "adam" not in config.features:
        return None, None, None, None
    regularised = gradient
    if config.regularisation:
        regularised = jax.tree.map(lambda g, p: g + config.regularisation * p, gradient, params)
    mu = jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, state.mu, regularised)
    nu = jax.tree.map(lambda v, g: B2 * v + (1 - B2) * jnp.square(g), state.nu, regularised)
    t = optax.safe_increment(state.count)
    scale = jax.tree.map(lambda v: 1 / (jnp.sqrt(v / (1 - B2**t)) + EPSILON), nu)
    direction = jax.tree.map(lambda m, s: m / (1 - B1**t) * s, mu, scale)
    return mu, nu, direction, jax.tree.map(jnp.multiply, gradient, scale)


def _see(config: MetaOptimizerConfig, tensor: _Coordinates) -> tuple[Array, tuple[Array, ...]]:
    """The chosen features: each coordinate's own [..., f], and those that they share."""
    own, shared = [tensor.gradient[..., None][..., :0]], ()  # none yet, sharded as the gradient
    if "log_sign" in config.features:
        own.append(features.log_sign(tensor.gradient))
    if "adam" in config.features:
        own.append(jnp.stack([tensor.direction, tensor.normalised], axis=-1))
    if "parameter" in config.features:
        own.append(features.parameter_features(tensor.parameter))
    if "layer" in config.features:
        shared = features.layer_features(tensor.parameter, tensor.position)
    return jnp.concatenate(own, axis=-1), shared


def _situation(config: MetaOptimizerConfig, aim: Aim, count: Array) -> tuple[Array, ...]:
    """The features that all coordinates share, as one array, if any are chosen."""
    chosen = []
    if "aim" in config.features:
        chosen.append(features.aim_features(aim))
    if "time" in config.features:
        chosen.append(features.time_features(aim, count))
    return (jnp.concatenate(chosen),) if chosen else ()


def _pace(config: MetaOptimizerConfig, aim: Aim, count: Array) -> Array:
    """eta_t / eta: a half cosine over the horizon, 1/3 where it is not known; 1 without time."""
    if "time" not in config.features:
        return jnp.ones([])
    _, known, left = features.time_features(aim, count)
    return jnp.where(known > 0, jnp.square(jnp.sin(0.5 * jnp.pi * left)), 1 / 3)


def _outputs(config: MetaOptimizerConfig) -> int:
    return 1 + ("adam" in config.features) + ("parameter" in config.features)


def _update_rule(config: MetaOptimizerConfig, readout: Array, tensor: _Coordinates) -> Array:
    """The equation of `scale_by_meta_optimizer`."""
    bounded = list(jnp.moveaxis(jnp.tanh(readout), -1, 0))
    update = config.learning_rate * config.shift * bounded.pop()
    if "adam" in config.features:
        update -= config.learning_rate * jnp.exp(2 * bounded.pop()) * tensor.direction
    if "parameter" in config.features and not tensor.position.bias:
        rms = features.root_mean_square(tensor.parameter)
        soft_sign = jnp.tanh(tensor.parameter / (SOFTNESS * rms))
        update -= config.shrinkage * jnp.exp(2 * bounded.pop()) * rms * soft_sign
    return update


def _float32(x: Array) -> Array:
    """At least float32: a logarithm or a squared gradient in 16 bits loses what matters."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _zeros(params: Params, *trailing: int) -> PyTree:
    """Zeros of each parameter's shape and trailing axes, sharded as the parameter is."""

    def zeros(p):
        plain = jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32))
        return jnp.broadcast_to(plain[(..., *[None] * len(trailing))], p.shape + trailing)

    return jax.tree.map(zeros, params)


def _leaves(tree: PyTree, treedef) -> list:
    if tree is None:
        return [None] * treedef.num_leaves
    return [_float32(leaf) for leaf in treedef.flatten_up_to(tree)]


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
