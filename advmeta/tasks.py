"""A task: train this optimizee on these few examples, and withstand that adversary on others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from advmeta import data, optimizees
from advmeta.attacks.threat_model import ThreatModel
from advmeta.attacks.validation import check_arrays
from advmeta.types import Array, Batch, Key, Norm, Optimizee

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

    def __post_init__(self) -> None:
        if not _is_placeholder(self.train):
            for part in (self.train, self.held_out):
                check_arrays(*part)
            check_batch_size(self.batch_size, jnp.shape(self.train.y)[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TaskFamily:
    """A distribution of tasks of one shape, so that many of them run under one `jax.vmap`.

    Each task draws its own training and held-out examples from the pool, without overlap.

    Args:
      pool: the examples to draw from, x [n, h, w, c].
      threat_model: what the adversary may do.
      optimizee: the model.
      train_examples: size of a task's training set; the rest of the pool is held out.
      batch_size: examples an inner step.
      replay: pool.x attacked once, for another model, or None.

    Raises:
      ValueError: the batch is larger than the training set, or the pool too small to split.

    Example:
      >>> family = TaskFamily(
      ...     pool=advmeta.data.load("digits").train, threat_model=advmeta.ThreatModel(),
      ...     optimizee=advmeta.optimizees.mlp(), train_examples=600)
      >>> task = family.sample(jax.random.key(0))
      >>> task.train.x.shape, task.held_out.x.shape
      ((600, 8, 8, 1), (400, 8, 8, 1))
    """

    pool: Batch
    threat_model: ThreatModel
    optimizee: Optimizee = dataclasses.field(metadata=_STATIC)
    train_examples: int = dataclasses.field(metadata=_STATIC)
    batch_size: int = dataclasses.field(default=128, metadata=_STATIC)
    replay: Array | None = None

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, self.train_examples)
        if _is_placeholder(self.pool):
            return
        check_arrays(*self.pool)
        available = self.pool.y.shape[0]
        if self.train_examples >= available:
            raise ValueError(
                f"train_examples={self.train_examples} of a pool of {available} leave none to hold "
                f"out; write train_examples={available // 2}, say"
            )

    def sample(self, key: Key) -> Task:
        """Draws a task; the same key gives the same one."""
        order = jax.random.permutation(key, self.pool.y.shape[0])
        train, held_out = order[: self.train_examples], order[self.train_examples :]
        return Task(
            train=take(self.pool, train),
            held_out=take(self.pool, held_out),
            threat_model=self.threat_model,
            optimizee=self.optimizee,
            batch_size=self.batch_size,
            replay=None if self.replay is None else jnp.take(self.replay, train, axis=0),
        )


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A `TaskFamily` in words and numbers.

    Args:
      dataset: a name or file that `advmeta.data.load` knows; tasks are drawn from its training
        part alone.
      optimizee: a name that `advmeta.optimizees.by_name` knows.
      train_examples: size of a task's training set.
      batch_size: examples an inner step.
      norm: "linf", "l2" or "l1".
      epsilon: radius of the threat model, for inputs in [0, 1].
    """

    dataset: str = "digits"
    optimizee: str = "mlp-20"
    train_examples: int = 500
    batch_size: int = 128
    norm: Norm = "linf"
    epsilon: float = 0.1

    def __post_init__(self) -> None:
        ThreatModel(self.norm, self.epsilon)
        optimizees.by_name(self.optimizee)
        check_batch_size(self.batch_size, self.train_examples)

    def build(self) -> TaskFamily:
        """Loads the data.

        Raises:
          ValueError: an unknown data set, or one too small for ``train_examples``.
        """
        dataset = data.load(self.dataset)
        return TaskFamily(
            pool=dataset.train,
            threat_model=ThreatModel(self.norm, self.epsilon),
            optimizee=optimizees.by_name(self.optimizee, dataset.num_classes),
            train_examples=self.train_examples,
            batch_size=self.batch_size,
        )


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


def _is_placeholder(batch) -> bool:
    """Whether it holds something else than data, as tree transformations and in_axes put there."""
    data_like = (jax.Array, np.ndarray, np.generic, list, tuple, dict, str)
    return not isinstance(batch, Batch) or not all(isinstance(leaf, data_like) for leaf in batch)
