"""The coordinate-wise LSTM: one small network, shared by all coordinates of all models."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer, lecun_normal, zeros

from advmeta.types import Array


class Memory(NamedTuple):
    """What one LSTM layer remembers of each coordinate."""

    h: Array  # [hidden, ...] the output
    c: Array  # [hidden, ...] the cell


class LSTM(nn.Module):
    """A stack of LSTM layers with a linear readout, over the first axis.

    ``i, f, g, o = split(W [x; h] + V s + b)``
    ``c' = sigmoid(f + 1) c + sigmoid(i) tanh(g)``
    ``h' = sigmoid(o) tanh(c')``,  and h' is the x of the next layer, which has no s.

    Reference:
      Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000, whose bias starts
      at 1 (Jozefowicz et al. 2015).
    """

    hidden: tuple[int, ...]  # units of each layer
    outputs: int

    @nn.compact
    def __call__(
        self, own: Array, shared: tuple[Array, ...], memory: tuple[Memory, ...]
    ) -> tuple[Array, tuple[Memory, ...]]:
        """One step of every coordinate.

        Args:
          own: x, the features of each coordinate, [f, ...].
          shared: s, features that whole rows or tensors share, [f, ...], with axes of 1 so that
            they broadcast to the coordinates.
          memory: of each layer.

        Returns:
          The readout, [outputs, ...], and the new memory.
        """
        x, updated = own, []
        for layer, (units, (h, c)) in enumerate(zip(self.hidden, memory, strict=True)):
            kernel, bias = Affine(4 * units, name=f"own_{layer}")(x.shape[0] + units)
            if layer == 0:
                kernels = [
                    Kernel(4 * units, name=f"shared_{group}")(value.shape[0])
                    for group, value in enumerate(shared)
                ]
                x, kernel, bias = merge_shared(own, shared, kernel, bias, kernels)
            i, f, g, o = jnp.split(affine(kernel, bias, jnp.concatenate([x, h])), 4)
            c = nn.sigmoid(f + 1.0) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            x = h
            updated.append(Memory(h, c))
        # Zero: before any meta-training the update is the nominal one.
        kernel, bias = Affine(self.outputs, zeros, name="readout")(x.shape[0])
        return affine(kernel, bias, x), tuple(updated)


class Linear(nn.Module):
    """A linear map of what rows or tensors share, ``V s``; zero before any meta-training."""

    outputs: int

    @nn.compact
    def __call__(self, shared: tuple[Array, ...]) -> Array:
        """From arrays that broadcast to the coordinates, [f, ...] each, to [outputs, ...]."""
        products = [
            product(Kernel(self.outputs, zeros, name=f"shared_{group}")(value.shape[0]), value)
            for group, value in enumerate(shared)
        ]
        return (
            sum(products[1:], start=products[0])
            if products
            else jnp.zeros(self.outputs, jnp.float32)
        )


class Kernel(nn.Module):
    """The kernel of a `flax.linen.Dense`, [inputs, outputs]."""

    outputs: int
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(self, inputs: int) -> Array:
        return self.param("kernel", self.kernel_init, (inputs, self.outputs))


class Affine(nn.Module):
    """Kernel and bias of a `flax.linen.Dense`, [inputs, outputs] and [outputs]."""

    outputs: int
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Array, Array]:
        kernel = self.param("kernel", self.kernel_init, (inputs, self.outputs))
        return kernel, self.param("bias", zeros, (self.outputs,))


def product(kernel: Array, x: Array) -> Array:
    """``W^T x``, from [f, ...] to [outputs, ...]."""
    return jnp.tensordot(kernel, x, axes=(0, 0))


def affine(kernel: Array, bias: Array, x: Array) -> Array:
    """``W^T x + b``; b is [outputs], or broadcasts to [outputs, ...]."""
    return product(kernel, x) + _with_axes(bias, x.ndim)


def _with_axes(bias: Array, ndim: int) -> Array:
    """[outputs, 1, ...]"""
    return jnp.expand_dims(bias, range(bias.ndim, ndim))


def merge_shared(
    own: Array, shared: tuple[Array, ...], kernel: Array, bias: Array, kernels: list[Array]
) -> tuple[Array, Array, Array]:
    """``W [x; h] + V s + b = W' [x'; h] + b'``: one product over all coordinates for layer 0.

    Shared features that are written out for each coordinate join its own ones; those that broadcast
    to the coordinates go into the bias.

    Args:
      own: x, [f, ...].
      shared: s.
      kernel: the transpose of W, [f + units, outputs].
      bias: b, [outputs].
      kernels: of V, one for each of s.

    Returns:
      x', the transpose of W', and b', [outputs, 1, ...] where something went into it.
    """
    features, parts = [own], [kernel[: own.shape[0]]]
    for value, of_value in zip(shared, kernels, strict=True):
        if jax.typeof(value[:0]) == jax.typeof(own[:0]):  # in shape, and in how it is sharded
            features.append(value)
            parts.append(of_value)
        else:
            bias = _with_axes(bias, value.ndim) + product(of_value, value)
    return jnp.concatenate(features), jnp.concatenate([*parts, kernel[own.shape[0] :]]), bias


def flatten(coordinates: tuple[int, ...], x: Array) -> Array:
    """From [f, ...] that broadcasts to the coordinates to [f, n], n their number or one."""
    if math.prod(x.shape[1:]) > 1:
        x = jnp.broadcast_to(x, (x.shape[0], *coordinates))
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))
