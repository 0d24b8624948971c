"""The coordinate-wise LSTM: one small network, shared by all coordinates of all models."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from advmeta.types import Array


class Memory(NamedTuple):
    """What one LSTM layer remembers of each coordinate."""

    h: Array  # [..., hidden] the output
    c: Array  # [..., hidden] the cell


class LSTM(nn.Module):
    """A stack of LSTM layers with a linear readout, over the last axis.

    ``i, f, g, o = split(W x + U h + b)``
    ``c' = sigmoid(f + 1) c + sigmoid(i) tanh(g)``
    ``h' = sigmoid(o) tanh(c')``,  and h' is the x of the next layer.

    Reference:
      Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000, whose bias starts
      at 1 (Jozefowicz et al. 2015).
    """

    hidden: tuple[int, ...]  # units of each layer
    outputs: int

    @nn.compact
    def __call__(
        self, features: tuple[Array, ...], memory: tuple[Memory, ...]
    ) -> tuple[Array, tuple[Memory, ...]]:
        """features: arrays [..., f] that broadcast to the coordinates; returns [..., outputs]."""
        x, updated = features, []
        for layer, (units, (h, c)) in enumerate(zip(self.hidden, memory, strict=True)):
            # W x as a sum over groups of features: what is the same for a whole tensor or row is
            # multiplied once, not once a coordinate.
            gates = nn.Dense(4 * units, name=f"recurrent_{layer}")(h)
            for group, value in enumerate(x):
                name = f"input_{layer}_{group}"
                gates += nn.Dense(4 * units, use_bias=False, name=name)(value)
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = nn.sigmoid(f + 1.0) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            x = (h,)
            updated.append(Memory(h, c))
        # A small readout: before any meta-training the update is close to the nominal one.
        initializer = jax.nn.initializers.variance_scaling(0.01, "fan_in", "normal")
        readout = nn.Dense(self.outputs, kernel_init=initializer, name="readout")(x[0])
        return readout, tuple(updated)
