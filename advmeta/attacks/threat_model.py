"""What the adversary may do: the norm ball around x, cut to the bounds of the input space."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from advmeta.attacks import l1_ball
from advmeta.attacks.batching import to_reduce
from advmeta.types import Array, Key, Norm

ORDERS = {"linf": np.inf, "l2": 2.0, "l1": 1.0}
NORMS = tuple(ORDERS)
# The share of coordinates that a steepest step in l1 moves.
STEEPEST_SHARE = 0.05


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """The set of inputs that count as a perturbation of x.

    ``{x' : ||x' - x||_norm <= epsilon and lower <= x' <= upper}``

    ``epsilon`` is a pytree leaf, so it may be traced, and it may be an array [n] with one radius an
    example. The norm and the bounds are static.

    Args:
      norm: "linf", "l2" or "l1", over all axes of one example.
      epsilon: radius in the units of x; a number or an array [n].
      bounds: the smallest and the largest value that an input may have.

    Raises:
      ValueError: unknown norm, negative or non-finite epsilon, bounds out of order.

    Example:
      >>> advmeta.ThreatModel("linf", epsilon=8 / 255)
      ThreatModel(norm='linf', epsilon=0.03137254901960784, bounds=(0.0, 1.0))
    """

    norm: Norm = dataclasses.field(default="linf", metadata={"static": True})
    epsilon: float | Array = 0.1
    bounds: tuple[float, float] = dataclasses.field(default=(0.0, 1.0), metadata={"static": True})

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r} is unknown; the known norms are {list(NORMS)}")
        lower, upper = self.bounds
        if not lower < upper:
            raise ValueError(
                f"bounds={self.bounds!r}: the lower bound must be below the upper one; "
                "images in [0, 1] have bounds=(0.0, 1.0)"
            )
        # Tracers, and the placeholders that tree transformations put here, cannot be looked at.
        known = (int, float, np.ndarray, np.number, jax.Array)
        if isinstance(self.epsilon, known) and not isinstance(self.epsilon, Tracer):
            epsilon = np.asarray(self.epsilon)
            if not (np.isfinite(epsilon).all() and (epsilon >= 0).all()):
                raise ValueError(
                    f"epsilon={self.epsilon!r} must be finite and at least 0: it is the radius of "
                    "the ball, in the units of x (for 8-bit images in [0, 1] often 8 / 255)"
                )

    def radius(self, x: Array) -> Array:
        """Epsilon, shaped to broadcast over the examples of x [n, ...]."""
        epsilon = jnp.asarray(self.epsilon, x.dtype)
        return epsilon.reshape(epsilon.shape + (1,) * (x.ndim - 1)) if epsilon.ndim else epsilon

    def distance(self, x: Array, x_adv: Array) -> Array:
        """The norm of x_adv - x for each example, [n]."""
        flat = (x_adv - x).reshape(x.shape[0], -1)
        if self.norm == "l2":
            return jnp.sqrt(to_reduce(jnp.square(flat)).sum(axis=1))
        size = to_reduce(jnp.abs(flat))
        return size.max(axis=1) if self.norm == "linf" else size.sum(axis=1)

    def l2_radius(self, size: int) -> float | Array:
        """The largest l2 norm within the ball, of examples with that many values."""
        return self.epsilon * size**0.5 if self.norm == "linf" else self.epsilon

    def widest(self, size: int) -> float:
        """The largest distance within the bounds, of examples with that many values."""
        lower, upper = self.bounds
        return (upper - lower) * size ** (1 / ORDERS[self.norm])

    def project(self, x_adv: Array, x: Array) -> Array:
        """The point of the ball nearest to x_adv, then clipped to the bounds.

        Clipping moves every coordinate towards x, which is in bounds, so it cannot leave the ball.
        In l1 it would give away much of it, so there this is the nearest point of ball and bounds
        together (see `l1_ball.project`); what is clipped then is rounding.
        """
        radius = self.radius(x)
        if self.norm == "linf":
            delta = jnp.clip(x_adv - x, -radius, radius)
        elif self.norm == "l1":
            delta = l1_ball.project(x_adv - x, x, radius, self.bounds)
        else:
            delta = x_adv - x
            delta = delta * jnp.minimum(1.0, radius / jnp.maximum(_l2(delta), 1e-12))
        return jnp.clip(x + delta, *self.bounds)

    def steepest(self, gradient: Array) -> Array:
        """The direction of unit norm along which a linear loss with this gradient grows fastest.

        For l1, the signs of the largest twentieth of the entries, at least one, over their number.
        The fastest would be the largest entry alone. But one pixel is soon at its bound, and all
        further steps would be lost on it: hence the sparse steps of Tramer and Boneh 2019,
        Adversarial Training and Robustness for Multiple Perturbations. arXiv:1904.13000

        Where the gradient is NaN, as of a square root of 0, x stays as it is.
        """
        gradient = jnp.nan_to_num(gradient)
        if self.norm == "linf":
            return jnp.sign(gradient)
        if self.norm == "l1":
            return l1_ball.sparse_sign(gradient, STEEPEST_SHARE)
        # Squares of what a saturated model has for a gradient, 1e-30, are 0. A power of two
        # changes no digit of the rest.
        axes = tuple(range(1, gradient.ndim))
        _, exponent = jnp.frexp(jnp.abs(gradient).max(axis=axes, keepdims=True))
        one = jnp.ones(exponent.shape, gradient.dtype)
        gradient *= jnp.ldexp(one, -jnp.clip(exponent, -126, 126))
        return gradient / jnp.maximum(_l2(gradient), 1e-12)

    def random_start(self, keys: Key, x: Array) -> Array:
        """A point uniform in each example's ball, clipped to the bounds. keys [n]."""
        if self.norm == "linf":
            noise = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype, -1, 1))(keys)
        else:
            dimension, order = x[0].size, ORDERS[self.norm]
            noise = jax.vmap(lambda k: jax.random.ball(k, dimension, order, dtype=x.dtype))(keys)
            noise = noise.reshape(x.shape)
        return jnp.clip(x + self.radius(x) * noise, *self.bounds)


def example_keys(key: Key, x: Array) -> Key:
    """One key an example [n], made from the key and the example's own bits.

    An attack that draws with these gives each example the same random numbers whatever the batch it
    is in and wherever in it it stands.
    """
    words = jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1).astype(jnp.float32), jnp.uint32)
    # A random odd multiplier a position makes the sum (mod 2^32) a universal hash of the words.
    multiplier = jax.random.bits(jax.random.key(0), words.shape[1:], jnp.uint32) | jnp.uint32(1)
    return jax.vmap(lambda word: jax.random.fold_in(key, word))((words * multiplier).sum(axis=1))


def _l2(v: Array) -> Array:
    axes = tuple(range(1, v.ndim))
    return jnp.sqrt(to_reduce(jnp.square(v)).sum(axis=axes, keepdims=True))
