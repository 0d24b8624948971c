"""The point of a hyperplane, within the bounds, that is nearest to a given point."""

import jax
import jax.numpy as jnp

from advmeta.attacks.batching import to_reduce
from advmeta.attacks.l1_ball import first_float
from advmeta.types import Array


def shortest_move(
    x: Array, w: Array, gap: Array, *, norm: str, bounds: tuple[float, float]
) -> Array:
    """The shortest move from x onto a hyperplane that stays within the bounds, [n, ...].

    ``argmin_d ||d||_norm  s.t.  <w, d> = gap,  lower <= x + d <= upper``

    Where the hyperplane does not meet the box, the move into the corner that gets nearest to it.

    With c_i the room of coordinate i in its direction, the solution moves each coordinate by
    ``min(lambda s_i, c_i)``, ``s_i = 1`` for linf and ``|w_i|`` for l2, where lambda solves
    ``g(lambda) = sum_i |w_i| min(lambda s_i, c_i) = |gap|``. The reference sorts the kinks of g. As
    g is concave and piecewise linear, Newton's method from 0 climbs to the root without
    overshooting and ends exactly on it, after a few passes over the coordinates and no sort.

    For l1 a coordinate with a larger |w_i| is always the better one to move, so the largest go to
    their bounds, and those with the |w_i| at which the hyperplane is reached go part of the way.

    Args:
      x: points [n, ...].
      w: normals of the hyperplanes [n, ...].
      gap: how much ``<w, x + d>`` must exceed ``<w, x>`` [n].
      norm: "linf", "l2" or "l1".
      bounds: of every coordinate.

    Returns:
      d [n, ...].

    Reference:
      Croce and Hein 2020, Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary
      Attack, section 2.2. arXiv:1907.02044
    """
    shape = x.shape
    x, w = x.reshape(shape[0], -1), w.reshape(shape[0], -1)
    # Of order 1, so that no square underflows where a saturated model has gradients of 1e-30.
    largest = to_reduce(jnp.abs(w)).max(axis=1)
    scale = jnp.where(largest > 0, largest, 1.0)
    weight, gap = jnp.abs(w) / scale[:, None], gap / scale
    direction = jnp.where(gap >= 0, 1.0, -1.0)[:, None] * jnp.sign(w)
    lower, upper = bounds
    room = jnp.where(direction > 0, upper - x, x - lower)
    room = jnp.where(weight > 0, jnp.maximum(room, 0.0), 0.0)
    if norm == "l1":
        return (_fill(jnp.abs(gap), weight, room) * direction).reshape(shape)
    speed = weight if norm == "l2" else jnp.where(weight > 0, 1.0, 0.0)
    length = _root(jnp.abs(gap), weight, room, speed)[:, None]
    # The mask is for 0 * inf, in a coordinate without weight of a plane that is out of reach.
    move = jnp.where(room > 0, jnp.minimum(length * speed, room), 0.0)
    return (move * direction).reshape(shape)


def _fill(r: Array, weight: Array, room: Array) -> Array:
    """The move [n, d] of coordinates, the heaviest first, with ``sum_i weight_i move_i = r``."""
    full = weight * room

    def heavier(than):
        return jnp.where(weight > than[:, None], full, 0.0).sum(axis=1)

    last = first_float(lambda than: heavier(than) > r, r.shape[0])
    is_last = weight == last[:, None]
    of_last = jnp.where(is_last, full, 0.0).sum(axis=1)
    part = jnp.where(of_last > 0, (r - heavier(last)) / jnp.where(of_last > 0, of_last, 1.0), 0.0)
    return jnp.where(weight > last[:, None], room, jnp.where(is_last, part[:, None] * room, 0.0))


def _root(r: Array, weight: Array, room: Array, speed: Array) -> Array:
    """The lambda [n] with ``sum_i weight_i min(lambda speed_i, room_i) = r``; inf where none is."""
    kink = jnp.where(room > 0, room / jnp.where(room > 0, speed, 1.0), 0.0)
    full, slope = weight * room, weight * speed

    def newton(length):
        free = kink > length[:, None]
        at_bound = jnp.where(free, 0.0, full).sum(axis=1)
        slopes = jnp.where(free, slope, 0.0).sum(axis=1)
        # No slope left: everything is at its bound and r is out of reach. The maximum keeps
        # rounding from undoing a step, so that the loop ends.
        reach = jnp.where(slopes > 0, (r - at_bound) / slopes, jnp.inf)
        return jnp.maximum(length, reach)

    def turn(carry):
        _, length = carry
        return length, newton(length)

    # The step depends on the set of free coordinates alone, so a row that has arrived stays exactly
    # where it is while others go on: the result does not depend on the rest of the batch.
    start = jnp.zeros_like(r)
    _, length = jax.lax.while_loop(
        lambda carry: (carry[1] > carry[0]).any(), turn, (start - 1.0, start)
    )
    return length
