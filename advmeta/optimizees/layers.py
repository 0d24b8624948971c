"""The layers that the optimizees share: pure init and apply, parameters in plain dicts."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from advmeta.types import Array, Key, Params

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "sigmoid": jax.nn.sigmoid,
}


@dataclasses.dataclass(frozen=True)
class Composed:
    """An `apply` whose first layer can also be called alone.

    ``apply(params, x) = rest(params, first(params, x))``

    Args:
      first: (params, x [n, ...]) -> the first layer's output, before its activation.
      rest: (params, that output) -> logits [n, k].

    Example:
      >>> apply = advmeta.optimizees.Composed(
      ...     first=lambda params, x: x @ params["w1"],
      ...     rest=lambda params, z: jax.nn.relu(z) @ params["w2"])
      >>> apply({"w1": jnp.eye(2), "w2": jnp.ones((2, 1))}, jnp.array([[3.0, -1.0]])).tolist()
      [[3.0]]
    """

    first: Callable[[Params, Array], Array]
    rest: Callable[[Params, Array], Array]

    def __call__(self, params: Params, x: Array) -> Array:
        return self.rest(params, self.first(params, x))


def check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is unknown; the known ones are {list(ACTIVATIONS)}")


def check_positive(**sizes) -> None:
    for name, size in sizes.items():
        for value in size if isinstance(size, tuple) else (size,):
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}={size!r} must hold whole numbers of at least 1")


def example_shape(x_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one example, from that shape or from an NHWC batch's."""
    return tuple(x_shape[1:]) if len(x_shape) == 4 else tuple(x_shape)


def init_affine(key: Key, shape: tuple[int, ...], activation: str | None = None) -> Params:
    """A kernel of this shape, [..., inputs, outputs], and a zero bias.

    The variance is 2 / fan-in before an activation that halves its input's variance (He et al.
    2015, eq. 10), and 1 / fan-in else.
    """
    gain = 2.0 if activation in ("relu", "gelu") else 1.0
    initializer = jax.nn.initializers.variance_scaling(gain, "fan_in", "normal")
    return {"kernel": initializer(key, shape), "bias": jnp.zeros(shape[-1])}


def dense(params: Params, x: Array) -> Array:
    return x @ params["kernel"] + params["bias"]


def conv(params: Params, x: Array, stride: int) -> Array:
    """A "SAME" convolution, as a product of patches and the kernel.

    XLA's own convolution is 6 to 9 times slower on a CPU at the sizes of optimizees (128 images of
    8x8, 8 and 16 channels), and slower yet when `jax.vmap` gives each model its own kernel.
    """
    height, width, inputs, outputs = params["kernel"].shape
    (top, bottom, rows), (left, right, columns) = (
        _same_padding(size, window, stride)
        for size, window in zip(x.shape[1:3], (height, width), strict=True)
    )
    x = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    patches = [
        x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
        for i in range(height)
        for j in range(width)
    ]
    kernel = params["kernel"].reshape(height * width * inputs, outputs)
    return jnp.concatenate(patches, axis=-1) @ kernel + params["bias"]


def _same_padding(size: int, window: int, stride: int) -> tuple[int, int, int]:
    """Padding before and after, and the size of the output, ceil(size / stride)."""
    output = -(-size // stride)
    padding = max((output - 1) * stride + window - size, 0)
    return padding // 2, padding - padding // 2, output


def normalise(params: Params, x: Array) -> Array:
    """Layer normalisation over h, w and c: it keeps no running statistics, so apply stays pure."""
    axes = tuple(range(1, x.ndim))
    centred = x - x.mean(axes, keepdims=True)
    variance = jnp.square(centred).mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * params["scale"] + params["bias"]
