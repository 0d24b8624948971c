"""One value, one key or one decision an example, applied to arrays whose first axis is examples."""

import jax
import jax.numpy as jnp

from advmeta.types import Array, Key, PyTree


def wide(v: Array, x: Array) -> Array:
    """v [n], shaped to broadcast over the examples of x [n, ...]."""
    return v.reshape(v.shape + (1,) * (x.ndim - 1))


def choose(mask: Array, a: PyTree, b: PyTree) -> PyTree:
    """a's examples where mask [n], else b's, in every leaf [n, ...]."""
    return jax.tree.map(lambda u, v: jnp.where(wide(mask, u), u, v), a, b)


def fold(keys: Key, data) -> Key:
    """`jax.random.fold_in` of the same number into each of the keys [n]."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)
