"""A small residual optimizee."""

import jax
import jax.numpy as jnp

from advmeta.optimizees.layers import (
    ACTIVATIONS,
    Composed,
    check_activation,
    check_positive,
    conv,
    dense,
    example_shape,
    init_affine,
    normalise,
)
from advmeta.types import Array, Key, Optimizee, Params


def resnet(
    channels: tuple[int, ...] = (16, 32), activation: str = "relu", num_classes: int = 10
) -> Optimizee:
    """A pre-activation residual network, one block a stage (He et al. 2016, arXiv:1603.05027).

    ``x <- shortcut(x) + conv(act(norm(conv(act(norm(x))))))``; stages after the first halve the
    image. Normalisation is layer normalisation, which keeps no running statistics.

    Args:
      channels: channels of each stage.
      activation: "relu", "tanh", "gelu" or "sigmoid".
      num_classes: number of logits.

    Returns:
      ``init(key, x_shape) -> params``, where x_shape is (h, w, c) or (n, h, w, c), and
      ``apply(params, x [n, h, w, c]) -> logits [n, num_classes]``.

    Raises:
      ValueError: an unknown activation, or a channel or class number below 1.

    Example:
      >>> init, apply = advmeta.optimizees.resnet(channels=(4, 8))
      >>> params = jax.jit(init, static_argnums=1)(jax.random.key(0), (8, 8, 1))
      >>> jax.jit(apply)(params, jnp.zeros((2, 8, 8, 1))).shape
      (2, 10)
    """
    channels = tuple(channels)
    check_activation(activation)
    check_positive(channels=channels, num_classes=num_classes)
    activate = ACTIVATIONS[activation]
    stages = len(channels)

    def init(key: Key, x_shape: tuple[int, ...]) -> Params:
        stem_key, head_key, *stage_keys = jax.random.split(key, stages + 2)
        inputs = example_shape(x_shape)[-1]
        params = {"layer_0": init_affine(stem_key, (3, 3, inputs, channels[0]), activation)}
        inputs = channels[0]
        for i, (k, outputs) in enumerate(zip(stage_keys, channels, strict=True), start=1):
            params[f"layer_{i}"] = _init_block(k, inputs, outputs, activation)
            inputs = outputs
        params[f"layer_{stages + 1}"] = init_affine(head_key, (inputs, num_classes))
        return params

    def first(params: Params, x: Array) -> Array:
        return conv(params["layer_0"], x, stride=1)

    def rest(params: Params, x: Array) -> Array:
        for i in range(1, stages + 1):
            x = block(params[f"layer_{i}"], x, stride=1 if i == 1 else 2)
        return dense(params[f"layer_{stages + 1}"], activate(x).mean(axis=(1, 2)))

    def block(params: Params, x: Array, stride: int) -> Array:
        y = activate(normalise(params["norm_0"], x))
        y = activate(normalise(params["norm_1"], conv(params["conv_0"], y, stride)))
        return conv(params["shortcut"], x, stride) + conv(params["conv_1"], y, stride=1)

    return Optimizee(init, Composed(first, rest))


def _init_block(key: Key, inputs: int, outputs: int, activation: str) -> Params:
    keys = jax.random.split(key, 3)
    return {
        "conv_0": init_affine(keys[0], (3, 3, inputs, outputs), activation),
        "conv_1": init_affine(keys[1], (3, 3, outputs, outputs), activation),
        "norm_0": {"scale": jnp.ones(inputs), "bias": jnp.zeros(inputs)},
        "norm_1": {"scale": jnp.ones(outputs), "bias": jnp.zeros(outputs)},
        "shortcut": init_affine(keys[2], (1, 1, inputs, outputs)),
    }
