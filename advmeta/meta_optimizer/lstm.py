"""The coordinate-wise LSTM: one small network, shared by all coordinates of all models."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from advmeta.types import Array


class Memory(NamedTuple):
    """What one LSTM layer remembers of each coordinate."""

    h: Array  # [..., hidden] the output
    c: Array  # [..., hidden] the cell


class LSTM(nn.Module):
    """A stack of LSTM layers with a linear readout, over the last axis.

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
          own: x, the features of each coordinate, [..., f].
          shared: s, features that whole rows or tensors share, as arrays that broadcast to the
            coordinates: multiplied once, not once a coordinate.
          memory: of each layer.

        Returns:
          The readout, [..., outputs], and the new memory.
        """
        x, updated = own, []
        for layer, (units, (h, c)) in enumerate(zip(self.hidden, memory, strict=True)):
            gates = Gates(units, name=f"own_{layer}")(jnp.concatenate([x, h], axis=-1))
            for group, value in enumerate(shared if layer == 0 else ()):
                more = Gates(units, use_bias=False, name=f"shared_{group}")(value)
                gates = [gate + term for gate, term in zip(gates, more, strict=True)]
            i, f, g, o = gates
            c = nn.sigmoid(f + 1.0) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            x = h
            updated.append(Memory(h, c))
        # Zero: before any meta-training the update is the nominal one.
        zeros = nn.initializers.zeros
        readout = nn.Dense(self.outputs, kernel_init=zeros, name="readout")(x)
        return readout, tuple(updated)


class Gates(nn.Module):
    """``split(W x + b)``: a dense layer of 4 units' width that gives each gate as its own array.

    A product for each gate, and not one that is split after it: what follows it then runs over
    whole arrays, where CPUs lose more on strided slices of a few units than on smaller products.
    """

    units: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        """From [..., f] to i, f, g and o, [..., units] each."""
        width = 4 * self.units
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], width))
        gates = [jnp.dot(x, part) for part in jnp.split(kernel, 4, axis=-1)]
        if not self.use_bias:
            return gates
        bias = self.param("bias", nn.initializers.zeros, (width,))
        return [gate + b for gate, b in zip(gates, jnp.split(bias, 4), strict=True)]


class Linear(nn.Module):
    """A linear map of what rows or tensors share, ``V s``; zero before any meta-training."""

    outputs: int

    @nn.compact
    def __call__(self, shared: tuple[Array, ...]) -> Array:
        """From arrays that broadcast to the coordinates, [..., f] each, to [..., outputs]."""
        total = jnp.zeros(self.outputs)
        for group, value in enumerate(shared):
            dense = nn.Dense(self.outputs, False, kernel_init=nn.initializers.zeros,
                             name=f"shared_{group}")  # fmt: skip
            total += dense(value)
        return total
