"""A task: train this optimizee on these few examples, and withstand that adversary on others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from advmeta.attacks.threat_model import ThreatModel
from advmeta.attacks.validation import check_arrays
from advmeta.meta_optimizer.features import Aim
from advmeta.types import Array, Batch, Key, Optimizee

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Task:
    """One training problem. A pytree: its arrays may be traced, batched and sharded.

    Args:
      train: the examples that inner steps draw their batches from, x [n, h, w, c].
      held_out: the examples that the trained model is judged on.
      threat_model: what the adversary may do.
      optimizee: the model.
      batch_size: examples an inner step.
      replay: train.x attacked once, for another model, or None; see `inner_gradients.replayed`.
      initial_scale: what the kernels of fresh parameters are multiplied with.
      noise: standard deviation of what `inner_gradients.noisy` adds to each value, in units of the
        largest l2 norm that the threat model allows.

    Raises:
      ValueError: the batch is larger than the training set, or what is in train or held_out is no
        batch of examples with their labels.
    """

    train: Batch
    held_out: Batch
    threat_model: ThreatModel
    optimizee: Optimizee = dataclasses.field(metadata=_STATIC)
    batch_size: int = dataclasses.field(default=128, metadata=_STATIC)
    replay: Array | None = None
    initial_scale: float | Array = 1.0
    noise: float | Array = 0.5

    def __post_init__(self) -> None:
        if not is_placeholder(self.train) and not is_placeholder(self.held_out):
            for part in (self.train, self.held_out):
                check_arrays(*part)
            check_batch_size(self.batch_size, jnp.shape(self.train.y)[-1])


def aim_at(threat_model: ThreatModel, horizon: ArrayLike | None) -> Aim:
    """What a meta-optimizer is told of a training that is to withstand the threat model.

    Of one radius an example it is told the mean.
    """
    epsilon = threat_model.epsilon
    return Aim(jnp.mean(epsilon) if jnp.ndim(epsilon) else epsilon, threat_model.norm, horizon)


def take(batch: Batch, indices: Array) -> Batch:
    return jax.tree.map(lambda a: jnp.take(a, indices, axis=0), batch)


def draw(batch: Batch, key: Key, size: int) -> Batch:
    """Draws examples at random, with replacement."""
    # A third of the hashing of `jax.random.randint`, and as uniform for fewer than 2^23 examples.
    uniform = jax.random.uniform(key, (size,), jnp.float32)
    return take(batch, jnp.int32(uniform * batch.y.shape[0]))


def check_batch_size(batch_size: int, available: int) -> None:
    if not 1 <= batch_size <= available:
        raise ValueError(
            f"batch_size={batch_size} must be between 1 and the training set's {available} "
            "examples; lower it or take more training examples"
        )


def is_placeholder(batch) -> bool:
    """Whether it holds something else than data, as tree transformations and in_axes put there.

    Raises:
      ValueError: it holds arrays, but is not a `Batch`.
    """
    data_like = (jax.Array, np.ndarray, np.generic, list, tuple, dict, str)
    if isinstance(batch, Batch):
        return not all(isinstance(leaf, data_like) for leaf in batch)
    if isinstance(batch, (tuple, list)) and any(isinstance(leaf, data_like) for leaf in batch):
        raise ValueError(
            f"examples are given as a {type(batch).__name__} of {len(batch)}: write "
            "advmeta.Batch(x, y), images [n, h, w, c] and their labels [n]"
        )
    return True
