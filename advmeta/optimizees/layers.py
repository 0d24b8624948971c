"""The layers that the optimizees share: pure init and apply, parameters in plain dicts."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

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
      first: (params, x [n, ...]) -> the first layer's output, before its activation: affine in x.
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


def check_positive(**sizes: int | tuple[int, ...]) -> None:
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
    """A "SAME" convolution as matrix products.

    ``z[h, w] = sum_{i, j} x[s h + i, s w + j] K[i, j] + b``

    With a stride s, the s x s pixels of a block become channels of one, so that what is left is a
    convolution with stride 1 of a kernel s times smaller. Then either there is one product for each
    place (i, j) under the kernel, which passes over the output for each, or the places' inputs are
    copied side by side for one product; whichever of input and output has fewer channels is the
    cheaper to pass over.

    XLA's own convolution is up to 9 times slower on a CPU at the sizes of optimizees, and slower
    yet when `jax.vmap` gives each model its own kernel.
    """
    x, kernel, (rows, columns) = _without_stride(params["kernel"], x, stride)
    inputs, outputs = kernel.shape[2:]
    places = list(np.ndindex(kernel.shape[:2]))
    shifted = [x[:, i : i + rows, j : j + columns] for i, j in places]
    # A product with one input is no matrix product but a multiplication, and XLA fuses their sum.
    if 1 < inputs < max(outputs, 8):
        z = jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, outputs)
    else:
        z = sum(v @ kernel[place] for v, place in zip(shifted, places, strict=True))
    return z + params["bias"]


def _without_stride(kernel: Array, x: Array, stride: int) -> tuple[Array, Array, tuple[int, int]]:
    """The padded x and the kernel with blocks of stride x stride pixels as one, and z's size."""
    paddings, places, sizes = [], [], []
    for size, window in zip(x.shape[1:3], kernel.shape[:2], strict=True):
        output = -(-size // stride)
        before = max((output - 1) * stride + window - size, 0) // 2
        blocks = -(-window // stride)
        paddings.append((before, (output - 1 + blocks) * stride - before - size))
        places.append((0, blocks * stride - window))
        sizes.append(output)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *[(*p, 0) for p in paddings], (0, 0, 0)])
    kernel = jnp.pad(kernel, [*places, (0, 0), (0, 0)])
    return _to_depth(x, stride, 1), _to_depth(kernel, stride, 0), tuple(sizes)


def _to_depth(x: Array, block: int, axis: int) -> Array:
    """[..., h, w, c, ...] -> [..., h / b, w / b, b b c, ...], with h at ``axis``."""
    height, width, channels = x.shape[axis : axis + 3]
    before, after = x.shape[:axis], x.shape[axis + 3 :]
    x = x.reshape(*before, height // block, block, width // block, block, channels, *after)
    x = jnp.swapaxes(x, axis + 1, axis + 2)
    return x.reshape(*before, height // block, width // block, block * block * channels, *after)


def normalise(params: Params, x: Array) -> Array:
    """Layer normalisation over h, w and c: it keeps no running statistics, so apply stays pure."""
    axes = tuple(range(1, x.ndim))
    centred = x - x.mean(axes, keepdims=True)
    variance = jnp.square(centred).mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * params["scale"] + params["bias"]
