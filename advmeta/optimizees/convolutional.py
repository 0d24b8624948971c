"""A small convolutional optimizee."""

import jax

from advmeta.optimizees.layers import (
    ACTIVATIONS,
    Composed,
    check_activation,
    check_positive,
    conv,
    dense,
    example_shape,
    init_affine,
)
from advmeta.types import Array, Key, Optimizee, Params


def cnn(
    channels: tuple[int, ...] = (16, 32), activation: str = "relu", num_classes: int = 10
) -> Optimizee:
    """3x3 convolutions with stride 2, then one dense layer.

    Args:
      channels: output channels of each convolution.
      activation: "relu", "tanh", "gelu" or "sigmoid".
      num_classes: number of logits.

    Returns:
      ``init(key, x_shape) -> params``, where x_shape is (h, w, c) or (n, h, w, c), and
      ``apply(params, x [n, h, w, c]) -> logits [n, num_classes]``.

    Raises:
      ValueError: an unknown activation, or a channel or class number below 1.

    Example:
      >>> init, apply = advmeta.optimizees.cnn(channels=(8,))
      >>> params = init(jax.random.key(0), (8, 8, 1))
      >>> jax.tree.map(jnp.shape, params["layer_1"])
      {'bias': (10,), 'kernel': (128, 10)}
    """
    channels = tuple(channels)
    check_activation(activation)
    check_positive(channels=channels, num_classes=num_classes)
    last = len(channels)

    def init(key: Key, x_shape: tuple[int, ...]) -> Params:
        height, width, inputs = example_shape(x_shape)
        params = {}
        *conv_keys, dense_key = jax.random.split(key, last + 1)
        for i, (k, outputs) in enumerate(zip(conv_keys, channels, strict=True)):
            params[f"layer_{i}"] = init_affine(k, (3, 3, inputs, outputs), activation)
            height, width, inputs = -(-height // 2), -(-width // 2), outputs
        params[f"layer_{last}"] = init_affine(dense_key, (height * width * inputs, num_classes))
        return params

    def layer(params: Params, i: int, x: Array) -> Array:
        if i < last:
            return conv(params[f"layer_{i}"], x, stride=2)
        return dense(params[f"layer_{i}"], x.reshape(x.shape[0], -1))

    def first(params: Params, x: Array) -> Array:
        return layer(params, 0, x)

    def rest(params: Params, x: Array) -> Array:
        for i in range(1, last + 1):
            x = layer(params, i, ACTIVATIONS[activation](x))
        return x

    return Optimizee(init, Composed(first, rest))
