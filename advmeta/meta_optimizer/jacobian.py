"""How far an adversary moves the logits of a model without its activations, and what lowers that.

To first order an adversary adds ``epsilon |dz/dx|_dual`` to what separates two logits z. The
derivative of a chain of layers is the product of their kernels, with activations between them that
a kernel's update knows nothing of; this looks at the product alone.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes

from advmeta.meta_optimizer.layers import LayerPosition
from advmeta.types import Array, Norm

# Entries of J below this share of its RMS count in proportion, larger ones alike. A pure sign keeps
# small entries on the move; measured from 0.05 to 0.4, 0.16 was best.
SOFTNESS = 0.16
# Places that a kernel looks at are kept apart as long as J has fewer entries than that.
MOST_ENTRIES = 1 << 18
# A kernel does not say how far apart the places are that it is applied at. Most convolutions go
# along with a halving of the image, by a stride or by pooling; larger windows lie side by side.
STRIDE, LARGEST_WINDOW = 2, 7  # pixels


def gain_and_pull(
    kernels: list[Array], positions: list[LayerPosition], norm: Norm = "linf"
) -> tuple[Array, list[Array]]:
    """`gain`, and its gradient by each kernel in units of its own RMS: the pull.

    Args:
      kernels: in the order of the layers, each [..., inputs, outputs], or [outputs, inputs, ...]
        where its position says so.
      positions: of each.
      norm: the adversary's.

    Returns:
      The gain [], and arrays of the kernels' shapes, of RMS 1; of zeros where the gradient is zero.

    Example:
      >>> from advmeta.meta_optimizer.layers import layer_positions
      >>> kernels = [jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, -1.0], [3.0, 1.0]])]
      >>> _, pull = gain_and_pull(kernels, layer_positions(kernels))
      >>> [p.shape for p in pull]
      [(2, 2), (2, 2)]
    """

    def of_unit_rms(kernels: list[Array]) -> tuple[Array, list[Array]]:
        kernels = jax.lax.stop_gradient(kernels)
        value, gradients = jax.value_and_grad(lambda ks: gain(ks, positions, norm))(kernels)
        return value, [g * jax.lax.rsqrt(jnp.square(g).mean() + 1e-30) for g in gradients]

    shardings = [jax.typeof(kernel).sharding for kernel in kernels]
    if any(AxisType.Explicit in sharding.mesh.axis_types for sharding in shardings):
        # Layers may be sharded in any way: the compiler is to choose how to multiply them.
        whole = NamedSharding(shardings[0].mesh, PartitionSpec())
        in_any_layout: Any = auto_axes(of_unit_rms, out_sharding=(whole, shardings))
        return in_any_layout(kernels)
    return of_unit_rms(kernels)


def gain(kernels: list[Array], positions: list[LayerPosition], norm: Norm = "linf") -> Array:
    """How far an adversary of radius 1 moves an output of a chain of layers, [].

    ``J = W_1 W_2 ... W_L C``,  ``mean_e |J_e|_1``  in linf,  ``mean_e |J_e|_2``  in l2

    e are the outputs, of all chains, and C takes the mean over the classes from the last layer's,
    since the loss sees differences of logits alone. ``|j|`` is softened to
    ``s log(e^{j / s} + e^{-j / s})``.

    A layer whose inputs are not a multiple of the outputs of the one before it starts a chain of
    its own. Where they are, as above a convolution, they are that layer's outputs at several
    places: J is then by all pixels under all windows, which overlap as in a "SAME" convolution of
    stride 2 of a square image. Where the places are no square, or windows are larger than 7 pixels
    a side, they lie side by side; where J would have too many entries, J is by the mean over the
    places, made as large as their sum would be if they were independent.
    """
    chains: list[tuple[Array, int]] = []
    jacobian, outputs = jnp.zeros((0, 0)), 0
    for i in reversed(range(len(kernels))):
        matrix = _matrix(kernels[i], positions[i])
        if i == len(kernels) - 1:
            several = matrix.shape[1] > 1  # a single logit is a difference already
            jacobian = matrix - several * matrix.mean(axis=1, keepdims=True)
            outputs = matrix.shape[1]
        elif jacobian.shape[0] % matrix.shape[1]:
            chains.append((jacobian, outputs))
            jacobian, outputs = matrix, matrix.shape[1]
        else:
            jacobian = _chain(kernels[i], positions[i], jacobian, positions[i + 1], norm)
    if kernels:
        chains.append((jacobian, outputs))
    total = sum((_dual(j, n, norm) for j, n in chains), start=jnp.float32(0))
    return total / max(1, sum(n for _, n in chains))


def _matrix(kernel: Array, position: LayerPosition) -> Array:
    """[inputs and places, outputs]"""
    return jnp.moveaxis(kernel, position.outputs, -1).reshape(-1, kernel.shape[position.outputs])


def _chain(
    kernel: Array, position: LayerPosition, jacobian: Array, above: LayerPosition, norm: Norm
) -> Array:
    """From J by this layer's outputs at all places to J by its inputs, [rows, columns] both.

    Columns are the outputs of the chain; of windows that lie side by side, once for each window.
    """
    matrix = _matrix(kernel, position)
    rows, outputs = matrix.shape
    places, columns = jacobian.shape[0] // outputs, jacobian.shape[1]
    if above.outputs == 0:  # (outputs, inputs, ...): places vary fastest
        apart = jacobian.reshape(outputs, places, columns).swapaxes(0, 1)
    else:
        apart = jacobian.reshape(places, outputs, columns)
    if rows * places * columns > MOST_ENTRIES:
        return matrix @ _mean_place(apart, norm)
    side = math.isqrt(places)
    if side**2 == places > 1 and kernel.ndim == 4:
        transposed = position.outputs == 0  # (outputs, inputs, height, width)
        windows = kernel.transpose(2, 3, 1, 0) if transposed else kernel
        if max(windows.shape[:2]) <= LARGEST_WINDOW:
            image = _under_windows(windows, apart.reshape(side, side, outputs, columns))
            return (image.transpose(2, 0, 1, 3) if transposed else image).reshape(-1, columns)
    return matrix @ apart.swapaxes(0, 1).reshape(outputs, places * columns)


def _mean_place(apart: Array, norm: Norm) -> Array:
    """The mean of J over places, [places, ...], times what makes its norm that of them all."""
    mean, places = apart.mean(axis=0), apart.shape[0]
    size, size_of_mean = (jnp.square(a).mean() + 1e-30 for a in (apart, mean))
    several = math.sqrt(places) if norm == "l2" else places
    return several * jax.lax.stop_gradient(jnp.sqrt(size / size_of_mean)) * mean


def _under_windows(kernel: Array, jacobian: Array) -> Array:
    """The transpose of a "SAME" convolution with the kernel [kh, kw, inputs, outputs].

    From J by its outputs, [h, w, outputs, columns], to J by its inputs, [2h, 2w, inputs, columns],
    or [h, w, ...] where the window is one pixel.
    """
    window, places = kernel.shape[:2], jacobian.shape[:2]
    strides = [min(STRIDE, pixels) for pixels in window]
    # What the windows hand down to their pixel (i, j) lies strides apart in the padded image.
    handed = jnp.einsum("hwoe,ijco->ijhwce", jacobian, kernel)
    parts, zero = [], jnp.zeros((), handed.dtype)
    for pixel in np.ndindex(*window):
        apart = [(i, k - 1 - i, s - 1) for i, k, s in zip(pixel, window, strides, strict=True)]
        parts.append(jax.lax.pad(handed[pixel], zero, [*apart, (0, 0, 0), (0, 0, 0)]))
    image = sum(parts[1:], start=parts[0])
    (top, left), (rows, columns) = (
        [(k - s) // 2 for k, s in zip(window, strides, strict=True)],
        [s * n for s, n in zip(strides, places, strict=True)],
    )
    return image[top : top + rows, left : left + columns]


def _dual(jacobian: Array, outputs: int, norm: Norm) -> Array:
    square = jnp.square(jacobian)
    if norm == "l2":
        return jnp.sqrt(square.reshape(-1, outputs).sum(axis=0) + 1e-20).sum()
    soft = SOFTNESS * jax.lax.stop_gradient(jnp.sqrt(square.mean() + 1e-20))
    return (soft * jnp.logaddexp(jacobian / soft, -jacobian / soft)).sum()
