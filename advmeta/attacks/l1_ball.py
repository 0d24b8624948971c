"""The l1 ball cut to the bounds: its nearest point, and ascent directions with few entries."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from advmeta.attacks.batching import to_reduce
from advmeta.types import Array


def project(delta: Array, x: Array, radius: Array, bounds: tuple[float, float]) -> Array:
    """The perturbation nearest to delta that is in the l1 ball and stays within the bounds.

    ``argmin_d ||d - delta||_2  s.t.  ||d||_1 <= radius,  lower <= x + d <= upper``

    With c_i the room of coordinate i in the direction of delta_i, the solution is
    ``d_i = sign(delta_i) min(max(|delta_i| - lambda, 0), c_i)`` with the smallest lambda >= 0 that
    brings it into the ball. To project onto the ball and then onto the box, or the other way round,
    gives another point. The paper sorts the 2 d kinks in lambda; `first_float` needs no sort.

    Args:
      delta: perturbations [n, ...].
      x: examples [n, ...], within the bounds.
      radius: of the ball, a number or [n, 1, ...].
      bounds: of every coordinate.

    Returns:
      d [n, ...].

    Example:
      >>> from advmeta.attacks import l1_ball
      >>> d = l1_ball.project(jnp.array([[1.0, 0.5]]), jnp.array([[0.75, 0.0]]), 0.5, (0.0, 1.0))
      >>> d.round(4)
      Array([[0.25, 0.25]], dtype=float32)

    Reference:
      Croce and Hein 2021, Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image
      Classifiers, section 2. arXiv:2103.01208
    """
    n = delta.shape[0]
    flat, x = delta.reshape(n, -1), x.reshape(n, -1)
    size, (lower, upper) = jnp.abs(flat), bounds
    room = jnp.maximum(jnp.where(flat > 0, upper - x, x - lower), 0.0)
    radius = jnp.broadcast_to(jnp.ravel(radius), (n,))

    def shrink(cut):
        return jnp.clip(size - cut.astype(x.dtype)[:, None], 0.0, room)

    cut = first_float(lambda cut: to_reduce(shrink(cut)).sum(axis=1) > radius, n)
    return (jnp.sign(flat) * shrink(cut)).reshape(delta.shape)


def sparse_sign(gradient: Array, share: Array | float) -> Array:
    """The signs of each example's largest entries, scaled to the l1 norm 1.

    Args:
      gradient: [n, ...].
      share: of the entries that are kept, a number or [n]; rounded up to a whole entry. Ties with
        the smallest that is kept are kept too, and zeros have no sign.

    Returns:
      [n, ...], 0 where the gradient is 0 everywhere.

    Example:
      >>> from advmeta.attacks import l1_ball
      >>> l1_ball.sparse_sign(jnp.array([[3.0, -2.0, 1.0, 0.0]]), 0.5)
      Array([[ 0.5, -0.5,  0. ,  0. ]], dtype=float32)
    """
    n, flat = gradient.shape[0], gradient.reshape(gradient.shape[0], -1)
    size, d = jnp.abs(flat), flat.shape[1]
    # The reference's rounding: the entry of this rank in ascending order is the smallest kept.
    rank = jnp.floor(jnp.clip((1 - jnp.broadcast_to(share, (n,))) * d, 0, d - 1)).astype(jnp.int32)
    smallest = first_float(lambda v: (size > v[:, None]).sum(axis=1) >= d - rank, n)
    signs = jnp.where(size >= smallest[:, None], jnp.sign(flat), 0.0)
    count = jnp.maximum(jnp.abs(signs).sum(axis=1, keepdims=True), 1.0)
    return (signs / count).reshape(gradient.shape)


def first_float(fails: Callable[[Array], Array], n: int) -> Array:
    """The smallest float32, at least 0, at which ``fails`` no longer holds, [n].

    Floats that are not negative have the order of their bits. So 31 halvings over the bits find the
    very float, where halvings over values would stop somewhere near it.

    Args:
      fails: [n] -> [n] bool: true up to some value of its example, false beyond it and for NaN.
      n: how many examples.
    """

    def turn(i, bits):
        further = bits | (jnp.uint32(1) << jnp.uint32(30 - i))
        before = jax.lax.bitcast_convert_type(further - 1, jnp.float32)
        return jnp.where(fails(before), further, bits)

    bits = jax.lax.fori_loop(0, 31, turn, jnp.zeros(n, jnp.uint32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
