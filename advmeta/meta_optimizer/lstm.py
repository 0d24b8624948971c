"""The coordinate-wise LSTM: one small network, shared by all coordinates of all models."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

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
            they broadcast to the coordinates: multiplied once, not once a coordinate.
          memory: of each layer.

        Returns:
          The readout, [outputs, ...], and the new memory.
        """
        x, updated = own, []
        for layer, (units, (h, c)) in enumerate(zip(self.hidden, memory, strict=True)):
            gates = Dense(4 * units, name=f"own_{layer}")(jnp.concatenate([x, h]))
            for group, value in enumerate(shared if layer == 0 else ()):
                gates += Dense(4 * units, use_bias=False, name=f"shared_{group}")(value)
            i, f, g, o = jnp.split(gates, 4)
            c = nn.sigmoid(f + 1.0) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            x = h
            updated.append(Memory(h, c))
        # Zero: before any meta-training the update is the nominal one.
        zeros = nn.initializers.zeros
        readout = Dense(self.outputs, kernel_init=zeros, name="readout")(x)
        return readout, tuple(updated)


class Dense(nn.Module):
    """``W^T x + b`` over the first axis, with the parameters of `flax.linen.Dense`.

    Features first and coordinates last: what follows a product then runs over whole rows of
    coordinates, where features last would leave rows of a few numbers.
    """

    outputs: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """From [f, ...] to [outputs, ...]."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[0], self.outputs))
        product = jnp.tensordot(kernel, x, axes=(0, 0))
        if not self.use_bias:
            return product
        bias = self.param("bias", nn.initializers.zeros, (self.outputs,))
        return product + jnp.expand_dims(bias, range(1, x.ndim))


class Linear(nn.Module):
    """A linear map of what rows or tensors share, ``V s``; zero before any meta-training."""

    outputs: int

    @nn.compact
    def __call__(self, shared: tuple[Array, ...]) -> Array:
        """From arrays that broadcast to the coordinates, [f, ...] each, to [outputs, ...]."""
        zeros = nn.initializers.zeros
        products = [
            Dense(self.outputs, use_bias=False, kernel_init=zeros, name=f"shared_{group}")(value)
            for group, value in enumerate(shared)
        ]
        return sum(products) if products else jnp.zeros(self.outputs)
