"""Models that draw random numbers: functions ``(x [n, ...], key) -> logits [n, k]``.

An attack draws one key an example, so that what it finds depends neither on the batch size nor on
the order; the model is therefore called on one example at a time, under `jax.vmap`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advmeta.attacks.validation import as_partial
from advmeta.types import Array, Key


def average_logits(logits_fn: Callable[..., Array], key: Key, samples: int) -> Partial:
    """A deterministic model for any attack: the mean of the logits over fixed draws.

    ``f(x) = 1/samples * sum_s logits_fn(x, key_s)``

    The draws are the same for every example and every call (common random numbers).

    Args:
      logits_fn: (x [n, ...], key) -> logits [n, k].
      key: for the draws.
      samples: how many draws.

    Returns:
      x [n, ...] -> logits [n, k]; a `jax.tree_util.Partial`.

    Raises:
      ValueError: samples below 1.

    Example:
      >>> noisy = lambda x, key: x + 0.1 * jax.random.normal(key, x.shape)
      >>> f = advmeta.attacks.average_logits(noisy, jax.random.key(0), samples=100)
      >>> bool(jnp.abs(f(jnp.ones([1, 2])) - 1).max() < 0.05)
      True

    Reference:
      Athalye et al. 2018, Synthesizing Robust Adversarial Examples, section 2.1. arXiv:1707.07397
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    return Partial(_mean_logits, as_partial(logits_fn), jax.random.split(key, samples))


def with_keys(logits_fn: Callable[..., Array], keys: Key, x: Array) -> Array:
    """The logits [n, k] of x [n, ...], each example with its own key [n]."""
    return jax.vmap(lambda x_i, key_i: logits_fn(x_i[None], key_i)[0])(x, keys)


def _mean_logits(logits_fn: Partial, keys: Key, x: Array) -> Array:
    def draw(key):
        return jax.vmap(lambda x_i: logits_fn(x_i[None], key)[0])(x)

    first = draw(keys[0])  # a scan over the rest needs the shape of the logits
    total, _ = jax.lax.scan(lambda total, key: (total + draw(key), None), first, keys[1:])
    return total / jnp.asarray(keys.shape[0], first.dtype)
