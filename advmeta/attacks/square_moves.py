"""What a proposal of `square` makes of a perturbation in l2 and in l1."""

import jax.numpy as jnp

from advmeta.attacks import square_windows
from advmeta.attacks.batching import to_reduce
from advmeta.attacks.square_windows import BumpWindows
from advmeta.types import Array


def move_mass_l2(delta: Array, window: BumpWindows, radius: Array) -> Array:
    """Moves one window of the perturbation, and what is left of epsilon, into another window.

    In the window ``to``, for each channel, with b the bump and d the old perturbation there,

    ``new = u / ||u|| * sqrt( (epsilon^2 - ||delta||^2) / c + ||windows||^2 ),  u = b + d / ||d||``

    the other window is emptied, and then all of delta is scaled to the norm epsilon. The norm of
    both windows is over all channels, for each channel, as in the reference.

    Args:
      delta: the perturbation [n, c, h, w].
      window: where from and where to, of one iteration; rows [n, h], columns [n, w], signs [n, c].
      radius: epsilon [n, 1, 1, 1].
    """
    to, emptied, bump = square_windows.paint(*window)
    both = jnp.maximum(to, emptied)
    squared, channels = jnp.square(delta), delta.shape[1]
    # Every norm follows from these sums: it is cheaper than to form what is normed.
    old = _pixel_sum(squared * to)
    in_windows = _pixel_sum(squared * both).sum(axis=1, keepdims=True)
    total = _pixel_sum(squared).sum(axis=1, keepdims=True)

    budget = jnp.maximum(jnp.square(radius) - total, 0.0) / channels + in_windows
    old_scale = 1 / (1e-12 + jnp.sqrt(old))
    # Formed, and its norm not expanded: where d undoes b little but rounding is left of it, and
    # only the norm of that very rounding scales it to what is wanted.
    new = bump + delta * (to * old_scale)
    new_scale = jnp.sqrt(budget) / (1e-12 + jnp.sqrt(_pixel_sum(jnp.square(new))))
    norm = jnp.sqrt(channels * budget + jnp.maximum(total - in_windows, 0.0))
    new_scale, kept_scale = (v * radius / (norm + 1e-12) for v in (new_scale, 1.0))
    # As in the reference, what both windows share belongs to ``to``.
    return new_scale * new + delta * (kept_scale * (1 - both))


def move_mass_l1(delta: Array, window: BumpWindows, radius: Array) -> Array:
    """The same in l1; the result is still to be projected onto the ball and the bounds.

    ``new = u / ||u||_1 * ( epsilon - ||delta||_1 + c ||windows||_1 ),  u = b + d / ||d||_1``

    for each channel, and nothing else is scaled. Here the norm of both windows is that of the
    channel; as in the reference each of the c channels gets c times it, so that the projection
    takes most of it away again and leaves what stands out.

    Args:
      delta, window, radius: see `move_mass_l2`.
    """
    to, emptied, bump = square_windows.paint(*window)
    both = jnp.maximum(to, emptied)
    size, channels = jnp.abs(delta), delta.shape[1]
    left = jnp.maximum(radius - _pixel_sum(size).sum(axis=1, keepdims=True), 0.0)
    budget = left + channels * _pixel_sum(size * both)
    new = bump + delta * to / (1e-12 + _pixel_sum(size * to))
    new_scale = budget / (1e-12 + _pixel_sum(jnp.abs(new)))
    return new_scale * new + delta * (1 - both)


def _pixel_sum(v: Array) -> Array:
    return to_reduce(v).sum(axis=(2, 3), keepdims=True)
