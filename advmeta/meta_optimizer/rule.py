"""The nominal rule, and where the networks' factors enter it: what an update is made of."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from advmeta.meta_optimizer import features, inputs
from advmeta.meta_optimizer.features import Aim
from advmeta.meta_optimizer.layers import LayerPosition
from advmeta.types import Array, PyTree

# Adam's constants (Kingma and Ba 2015, algorithm 1).
B1, B2, EPSILON = 0.9, 0.999, 1e-8
# A tensor whose RMS is below so many of Adam's steps is pulled in proportion to it: without that a
# model that has become small is pulled over zero and dies.
SMALL = 4
# Below this share of the tensor's mean a coordinate's second moment says nothing.
NEGLIGIBLE = 1e-8
# The nominal L2 term is at most this share of the gradient (RMS): where gradients are tiny, as
# early in a residual network, Adam would otherwise walk to zero.
LARGEST_SHARE = 0.3
# In a model that normalises, the size of a kernel says little of how far its inputs move the
# outputs: L2 and pull are this share of what they are elsewhere.
NORMALISED = 0.1


@dataclasses.dataclass(frozen=True)
class MetaOptimizerConfig:
    """What the LSTM sees and how large it is.

    Args:
      hidden: units of each LSTM layer.
      features: of `FEATURES`: "log_sign" (gradient), "adam" (normalised momentum and gradient),
        "parameter" (in units of its tensor's RMS), "jacobian" (the pull of `jacobian`), "layer"
        (position, fan-in, fan-out, RMS, RMS of the gradient, row and column means; layers,
        convolutions and normalisations of the model), "aim" (norm and epsilon), "reach" (how far
        the adversary moves the logits), "time" (steps taken and left), "loss" (whose gradient it
        is). "parameter", "jacobian", "layer", "reach" and regularisation need ``params`` in
        ``update``; "loss" looks at ``value``. By default all but "loss".
      learning_rate: eta, the step of the nominal Adam that the LSTM modulates. With the feature
        "time" it is warmed up over 40 steps, or a fifth of the horizon, and falls to zero as a half
        cosine; where the horizon is not known it stays at a third.
      regularisation: mu, the nominal L2 regularisation, a part of Adam's gradient.
      pull: nu, the nominal step that makes the model's Jacobian smaller, in units of eta. With the
        feature "reach" both are what there is against an adversary of unbounded reach r, and
        ``r / (1 + r)`` of it against others.
      shift: the largest step that the LSTM can take of its own, in units of eta.
      memory_dtype: of the LSTM's memory in the state; "bfloat16" halves it. A step is taken in
        float32 either way, and what it leaves is rounded.
      adaptivity: p, from 0 to 1/2: how far each coordinate's step has a length of its own. 1/2 is
        Adam; with 0 a tensor's coordinates share the root of Adam's second moment.
    """

    hidden: tuple[int, ...] = (8,)
    features: tuple[str, ...] = features.DEFAULT_FEATURES
    learning_rate: float = 0.035
    regularisation: float = 0.02
    pull: float = 0.64
    shift: float = 1.0
    memory_dtype: Literal["float32", "bfloat16"] = "float32"
    adaptivity: float = 0.35

    def __post_init__(self) -> None:
        unknown = [name for name in self.features if name not in features.FEATURES]
        if unknown or not self.features:
            raise ValueError(
                f"features={self.features!r}: {unknown or 'none'} cannot be used; the known "
                f"features are {list(features.FEATURES)}, and there must be at least one"
            )
        if not 0 <= self.adaptivity <= 0.5:
            raise ValueError(
                f"adaptivity={self.adaptivity} must lie between 0, one step size for a whole "
                "tensor, and 0.5, Adam's"
            )
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden={self.hidden!r} must hold the units of one layer or more")
        if self.memory_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"memory_dtype={self.memory_dtype!r} is none that a memory can be kept in: write "
                "'float32' or 'bfloat16'"
            )

    @property
    def needs_params(self) -> bool:
        regularised = "adam" in self.features and self.regularisation != 0
        return regularised or not {"parameter", "jacobian", "layer", "reach"}.isdisjoint(
            self.features
        )


def strength(config: MetaOptimizerConfig, positions: list[LayerPosition], reach: Array) -> Array:
    """The share of its L2 and of its pull that the rule has in this model, [].

    An adversary that moves no logit by a nat is no reason to regularise.
    """
    share = NORMALISED if any(position.normalised for position in positions) else 1.0
    return share * (reach / (1 + reach) if "reach" in config.features else jnp.float32(1))


def regularise(
    config: MetaOptimizerConfig, gradients: list, parameters: list, offsets: list, strength: Array
) -> list[Array]:
    """The gradients with that of the L2 regularisation, which the last of the offsets changes."""
    if "adam" not in config.features or not config.regularisation:
        return gradients

    def regularise(g: Array, p: Array, offset: Array) -> Array:
        mu = config.regularisation * strength
        rms = jnp.sqrt(jnp.mean(jnp.square(g)) + 1e-20)
        largest = LARGEST_SHARE * rms / features.root_mean_square(p)
        mu = jnp.minimum(mu, largest) * jnp.exp(2 * jnp.tanh(offset[-1]))
        return g + mu * p

    return list(map(regularise, gradients, parameters, offsets))


def _join(beta: float, moment: Array, new: Array) -> Array:
    """In the moment's dtype: what a reach in double precision touches is in double precision."""
    return (beta * moment + (1 - beta) * new).astype(moment.dtype)


def adam(
    config: MetaOptimizerConfig,
    moments: tuple[PyTree, PyTree],
    t: ArrayLike,
    gradient: optax.Updates,
    regularised: optax.Updates,
) -> tuple[tuple[PyTree, PyTree], PyTree, PyTree]:
    """Adam's moments after step t, its direction, and the gradient in the same units.

    In the place of the root of v_hat stands ``v_hat^p mean(v_hat)^(1/2 - p)``, with the mean over
    the tensor: with p below 1/2, small noisy gradients do not make steps of full length.

    Reference:
      Kingma and Ba 2015, algorithm 1 (arXiv:1412.6980); p after Chen et al. 2018, algorithm 1
      (arXiv:1806.06763), the mean added so that a step keeps its size.
    """
    if "adam" not in config.features:
        return moments, None, None
    mu, nu = moments
    mu = jax.tree.map(lambda m, g: _join(B1, m, g), mu, regularised)
    nu = jax.tree.map(lambda v, g: _join(B2, v, jnp.square(g)), nu, regularised)
    p = config.adaptivity

    def inverse_root(v: Array) -> Array:
        # At zero, where the moments of a dead pixel's weights go, a power has a derivative that
        # overflows. CPUs have logarithms and exponentials of whole vectors, but of powers none.
        v = v / (1 - B2**t)
        mean = v.mean() + 1e-30
        v += NEGLIGIBLE * mean + 1e-30
        return 1 / (jnp.exp(p * jnp.log(v) + (0.5 - p) * jnp.log(mean)) + EPSILON)

    scale = jax.tree.map(inverse_root, nu)
    direction = jax.tree.map(lambda m, s: m / (1 - B1**t) * s, mu, scale)
    return (mu, nu), direction, jax.tree.map(jnp.multiply, gradient, scale)


def pace(config: MetaOptimizerConfig, aim: Aim, count: Array) -> Array:
    """eta_t / eta: warmed up, then a half cosine, or 1/3 without a horizon; 1 without time."""
    if "time" not in config.features:
        return jnp.float32(1)
    _, known, left = features.time_features(aim, count)
    falling = jnp.where(known > 0, jnp.square(jnp.sin(0.5 * jnp.pi * left)), 1 / 3)
    return falling * features.warm_up(count, aim.horizon)


def update_rule(
    config: MetaOptimizerConfig,
    readout: Array,
    offset: Array,
    tensor: inputs.Coordinates,
    strength: Array,
) -> Array:
    """The equation of `scale_by_meta_optimizer`, over the pace."""
    update = config.shift * jnp.tanh(readout[-1])
    terms = zip(readout[:-1], offset[:-1], strict=True)
    factors = [jnp.exp(2 * jnp.tanh(own + shared)) for own, shared in terms]
    if "adam" in config.features:
        update -= factors.pop() * tensor.direction
    if "jacobian" in config.features and not tensor.position.bias:
        rms = features.root_mean_square(tensor.parameter)
        nu = config.pull * strength * rms / (rms + SMALL * config.learning_rate)
        update -= nu * factors.pop() * tensor.pull
    return config.learning_rate * update
