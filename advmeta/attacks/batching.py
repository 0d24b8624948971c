"""Arrays whose first axis is examples: one value, key or decision an example, and sums over it."""

import jax
import jax.numpy as jnp

from advmeta.types import Array, Key, PyTree


def wide(v: Array, x: Array) -> Array:
    """v [n], shaped to broadcast over the examples of x [n, ...]."""
    return v.reshape(v.shape + (1,) * (x.ndim - 1))


def to_reduce(v: Array) -> Array:
    """v itself, to stand between a product, difference or absolute value and its sum or maximum.

    On a CPU, XLA hands a reduction to a library (YNN) together with the arithmetic before it, and
    there that is ten times slower than in XLA's own loops (jaxlib 0.10.2; jax issue 37465). A
    selection it does not hand over.
    """
    return jnp.where(v == v, v, jnp.nan)  # NaN stays NaN


def choose(mask: Array, a: PyTree, b: PyTree) -> PyTree:
    """a's examples where mask [n], else b's, in every leaf [n, ...]."""
    return jax.tree.map(lambda u, v: jnp.where(wide(mask, u), u, v), a, b)


def fold(keys: Key, data) -> Key:
    """`jax.random.fold_in` of the same number into each of the keys [n]."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)
