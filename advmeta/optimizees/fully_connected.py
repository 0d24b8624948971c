"""Fully connected optimizees."""

import math

import jax

from advmeta.optimizees.layers import (
    ACTIVATIONS,
    Composed,
    check_activation,
    check_positive,
    dense,
    example_shape,
    init_affine,
)
from advmeta.types import Array, Key, Optimizee, Params


def linear(num_classes: int = 10) -> Optimizee:
    """Multinomial logistic regression, ``logits = W x + b``.

    Example:
      >>> init, apply = advmeta.optimizees.linear()
      >>> params = init(jax.random.key(0), (8, 8, 1))
      >>> jax.tree.map(jnp.shape, params)
      {'layer_0': {'bias': (10,), 'kernel': (64, 10)}}
    """
    return mlp(widths=(), num_classes=num_classes)


def mlp(
    widths: tuple[int, ...] = (20,), activation: str = "relu", num_classes: int = 10
) -> Optimizee:
    """A multilayer perceptron on the flattened input.

    Args:
      widths: units of each hidden layer.
      activation: "relu", "tanh", "gelu" or "sigmoid".
      num_classes: number of logits.

    Returns:
      ``init(key, x_shape) -> params``, where x_shape is one example's shape or an NHWC batch's,
      and ``apply(params, x [n, ...]) -> logits [n, num_classes]``.

    Raises:
      ValueError: an unknown activation, or a width or class number below 1.

    Example:
      >>> init, apply = advmeta.optimizees.mlp(widths=(40, 20), activation="tanh")
      >>> params = init(jax.random.key(0), (8, 8, 1))
      >>> apply(params, jnp.zeros((5, 8, 8, 1))).shape
      (5, 10)
    """
    widths = tuple(widths)
    check_activation(activation)
    check_positive(widths=widths, num_classes=num_classes)
    last = len(widths)

    def init(key: Key, x_shape: tuple[int, ...]) -> Params:
        sizes = (math.prod(example_shape(x_shape)), *widths, num_classes)
        return {
            f"layer_{i}": init_affine(k, sizes[i : i + 2], activation if i < last else None)
            for i, k in enumerate(jax.random.split(key, last + 1))
        }

    def first(params: Params, x: Array) -> Array:
        return dense(params["layer_0"], x.reshape(x.shape[0], -1))

    def rest(params: Params, x: Array) -> Array:
        for i in range(1, last + 1):
            x = dense(params[f"layer_{i}"], ACTIVATIONS[activation](x))
        return x

    return Optimizee(init, Composed(first, rest))
