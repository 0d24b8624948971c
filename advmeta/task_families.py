"""Distributions of tasks: what a meta-optimizer is meta-trained on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from advmeta import data, optimizees
from advmeta.attacks.threat_model import ThreatModel
from advmeta.attacks.validation import check_arrays
from advmeta.tasks import Task, check_batch_size, is_placeholder, take
from advmeta.types import Array, Batch, Key, Norm, Optimizee

_STATIC = {"static": True}


@dataclasses.dataclass(frozen=True)
class Variation:
    """How the tasks of one family differ, beside their examples; by default in nothing.

    Every task draws anew, and factors log-uniformly.

    Args:
      epsilon: the threat model's is multiplied or divided by up to this factor.
      train_examples: there are fewer by up to this factor.
      initial_scale: fresh kernels are multiplied or divided by up to this factor.
      noise: one of these is the task's; see `Task`.

    Raises:
      ValueError: a factor below 1, or no noise to choose from.
    """

    epsilon: float = 1.0
    train_examples: float = 1.0
    initial_scale: float = 1.0
    noise: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        for name in ("epsilon", "train_examples", "initial_scale"):
            if not 1 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name}={getattr(self, name)} is the largest factor between two tasks: write "
                    "1.0 for none, 2.0 for half to double"
                )
        if not self.noise or not all(0 <= value < float("inf") for value in self.noise):
            raise ValueError(f"noise={self.noise} must hold one number or more, none below 0")


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
      variation: what else differs from task to task.

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
    variation: Variation = dataclasses.field(default=Variation(), metadata=_STATIC)

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, self.train_examples)
        if is_placeholder(self.pool):
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
        fewer, radius, scale, noise = jax.random.split(jax.random.fold_in(key, 0), 4)
        variation = self.variation
        if variation.train_examples > 1:
            # Arrays keep their size: the first few examples, again and again.
            share = _factor(fewer, 1 / variation.train_examples, 1.0)
            distinct = jnp.ceil(share * self.train_examples).astype(int)
            train = train[jnp.arange(self.train_examples) % distinct]
        threat_model = self.threat_model
        if variation.epsilon > 1:
            factor = _factor(radius, 1 / variation.epsilon, variation.epsilon)
            threat_model = dataclasses.replace(threat_model, epsilon=factor * threat_model.epsilon)
        return Task(
            train=take(self.pool, train),
            held_out=take(self.pool, held_out),
            threat_model=threat_model,
            optimizee=self.optimizee,
            batch_size=self.batch_size,
            replay=None if self.replay is None else jnp.take(self.replay, train, axis=0),
            initial_scale=_factor(scale, 1 / variation.initial_scale, variation.initial_scale),
            noise=jax.random.choice(noise, jnp.array(variation.noise)),
        )


def _factor(key: Key, low: float, high: float) -> Array:
    """Log-uniform between the two; exactly 1 where both are."""
    return jnp.exp(jax.random.uniform(key, minval=np.log(low), maxval=np.log(high)))


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
      classes: the labels that are kept, numbered anew in their order; () keeps all.
      crop: pixels a side of the square that is cut out of the middle; None: the whole image.
      side: pixels a side that it is then resized to; None: as it is.
      variation: what differs from task to task.
    """

    dataset: str = "digits"
    optimizee: str = "mlp-20"
    train_examples: int = 500
    batch_size: int = 128
    norm: Norm = "linf"
    epsilon: float = 0.1
    classes: tuple[int, ...] = ()
    crop: int | None = None
    side: int | None = None
    variation: Variation = Variation()

    def __post_init__(self) -> None:
        ThreatModel(self.norm, self.epsilon)
        optimizees.by_name(self.optimizee)
        check_batch_size(self.batch_size, self.train_examples)
        if len(set(self.classes)) != len(self.classes) or len(self.classes) == 1:
            raise ValueError(f"classes={self.classes} must be two labels or more, none twice")
        if any(pixels is not None and pixels < 1 for pixels in (self.crop, self.side)):
            raise ValueError(f"crop={self.crop}, side={self.side}: both are pixels, at least 1")

    def build(self) -> TaskFamily:
        """Loads the data.

        Raises:
          ValueError: an unknown data set, or one too small for ``train_examples``.
        """
        dataset = data.load(self.dataset)
        classes = self.classes or tuple(range(dataset.num_classes))
        pool = _reshaped(_of_classes(dataset.train, classes), self.crop, self.side)
        return TaskFamily(
            pool=pool,
            threat_model=ThreatModel(self.norm, self.epsilon),
            optimizee=optimizees.by_name(self.optimizee, len(classes)),
            train_examples=self.train_examples,
            batch_size=self.batch_size,
            variation=self.variation,
        )


def _of_classes(batch: Batch, classes: tuple[int, ...]) -> Batch:
    """The examples of these classes, each labelled with its place among them."""
    place = np.full(max(*classes, int(batch.y.max())) + 1, -1)
    place[list(classes)] = np.arange(len(classes))
    labels = place[np.asarray(batch.y)]
    if absent := sorted(set(range(len(classes))) - set(labels)):
        raise ValueError(
            f"classes={classes}: there is no training example of {[classes[i] for i in absent]}"
        )
    return Batch(batch.x[labels >= 0], jnp.asarray(labels[labels >= 0], jnp.int32))


def _reshaped(batch: Batch, crop: int | None, side: int | None) -> Batch:
    """The middle of the images, resized with antialiasing."""
    n, height, width, channels = batch.x.shape
    x = batch.x
    if crop is not None:
        if crop > min(height, width):
            raise ValueError(f"crop={crop} is more than the images' {height} x {width} pixels")
        top, left = (height - crop) // 2, (width - crop) // 2
        x = x[:, top : top + crop, left : left + crop]
    if side is not None:
        x = jax.image.resize(x, (n, side, side, channels), "linear").clip(x.min(), x.max())
    return Batch(x, batch.y)
