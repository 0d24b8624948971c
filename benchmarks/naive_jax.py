"""The coordinate-wise LSTM as one first writes it in JAX: Flax's cell on flat coordinates."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from advmeta.meta_optimizer.features import log_sign
from advmeta.types import Array


class CoordinateWise(nn.Module):
    """As `benchmarks.torch_lstm.CoordinateWise`, with the cell that Flax recommends for speed."""

    hidden: int = 20

    @nn.compact
    def __call__(self, gradient: Array, state: tuple) -> tuple[Array, tuple]:
        first, second = state
        x = jnp.stack(list(log_sign(gradient)), axis=-1)
        first, h = nn.OptimizedLSTMCell(self.hidden)(first, x)
        second, h = nn.OptimizedLSTMCell(self.hidden)(second, h)
        return 0.1 * nn.Dense(1)(h).squeeze(-1), (first, second)

    def init_state(self, coordinates: int) -> tuple:
        zeros = jnp.zeros((coordinates, self.hidden))
        return (zeros, zeros), (zeros, zeros)


def truncation(loss, weights, params, state, batches):
    """d sum of the losses / d weights of the LSTM, over one inner step for each of the batches.

    Args:
      loss: (params, x, y) -> scalar.
      weights: of a `CoordinateWise`.
      params: of the optimizee.
      state: of the LSTM.
      batches: (x, y), each with a leading axis of inner steps.
    """
    theta, unravel = ravel_pytree(params)
    model = CoordinateWise()

    def objective(weights):
        def step(carry, batch):
            theta, state = carry
            value, gradient = jax.value_and_grad(lambda t: loss(unravel(t), *batch))(theta)
            update, state = model.apply(weights, jax.lax.stop_gradient(gradient), state)
            return (theta + update, state), value

        _, losses = jax.lax.scan(step, (theta, state), batches)
        return losses.sum()

    return jax.value_and_grad(objective)(weights)
