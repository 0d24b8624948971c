"""What a data set is, and how parts of it are drawn."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from advmeta.types import Batch


class Dataset(NamedTuple):
    """Images NHWC float32 in [0, 1] and labels int32 in [0, num_classes), on the device."""

    train: Batch
    test: Batch
    num_classes: int
    name: str


class Part(NamedTuple):
    """One part of a source, on the host: all labels, and images that are read when asked for."""

    labels: np.ndarray  # [n], of an integer dtype
    images: Callable[[np.ndarray], np.ndarray]  # indices [m] -> [m, h, w, c] uint8, or [0, 1]


class Source(NamedTuple):
    """What each kind of data set gives to `advmeta.data.load`."""

    train: Part
    test: Part
    num_classes: int


def split(batch: Batch, validation: int | float, seed: int = 0) -> tuple[Batch, Batch]:
    """Splits examples at random into what to train on and what to choose hyperparameters on.

    Args:
      batch: examples x [n, ...] and labels y [n].
      validation: how many examples to hold out (an int), or which fraction of them (a float).
      seed: of the draw; the same seed gives the same parts, on every platform.

    Returns:
      The rest and the validation part, disjoint, together all of the batch.

    Raises:
      ValueError: one of the parts would be empty.

    Example:
      >>> train, validation = advmeta.data.split(advmeta.data.load("digits").train, 0.2)
      >>> train.x.shape, validation.x.shape
      ((800, 8, 8, 1), (200, 8, 8, 1))
    """
    n = len(batch.y)
    fraction = isinstance(validation, float) and math.isfinite(validation)
    count = round(validation * n) if fraction else validation
    if not 0 < count < n:
        raise ValueError(
            f"validation={validation!r} holds out {count} of {n} examples; both parts need at "
            f"least one: give a fraction such as 0.2, or a count from 1 to {n - 1}"
        )
    order = permutation(n, seed)
    held_out, rest = order[:count], order[count:]
    return Batch(batch.x[rest], batch.y[rest]), Batch(batch.x[held_out], batch.y[held_out])


def permutation(n: int, seed: int) -> np.ndarray:
    """0 to n - 1 in an order that the seed fixes.

    From `numpy.random.RandomState`, whose stream is frozen: that of `numpy.random.Generator` may
    change with a release, and splits must not.
    """
    return np.random.RandomState(seed).permutation(n)


def draw(
    labels: np.ndarray,
    num_classes: int,
    train_examples: int | None,
    examples_per_class: int | None,
    seed: int,
) -> np.ndarray:
    """Indices of the training examples that the low-data regime keeps; all, in order, if none."""
    if train_examples is None and examples_per_class is None:
        return np.arange(len(labels))
    if train_examples is not None and examples_per_class is not None:
        raise ValueError(
            f"train_examples={train_examples} and examples_per_class={examples_per_class}: give "
            "one of the two"
        )
    order = permutation(len(labels), seed)
    if train_examples is not None:
        _check_count("train_examples", train_examples, len(labels), "training examples")
        return order[:train_examples]
    counts = np.bincount(labels, minlength=num_classes)
    _check_count("examples_per_class", examples_per_class, counts.min(),
                 f"training examples of class {counts.argmin()}")  # fmt: skip
    drawn = labels[order]
    keep = [np.flatnonzero(drawn == label)[:examples_per_class] for label in range(num_classes)]
    return order[np.sort(np.concatenate(keep))]  # the classes stay mixed, as in the random order


def _check_count(argument: str, count: object, available: int, of_what: str) -> None:
    whole = isinstance(count, (int, np.integer))
    if not whole or isinstance(count, bool) or not 1 <= count <= available:
        raise ValueError(
            f"{argument}={count!r} must be a whole number from 1 to {available}: there are "
            f"{available} {of_what}"
        )


def check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
    """Raises a ValueError unless all labels are classes."""
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{where}: labels lie in [{labels.min()}, {labels.max()}], but there are {num_classes} "
            f"classes, 0 to {num_classes - 1}"
        )


def to_batch(part: Part, indices: np.ndarray, where: str) -> Batch:
    """The chosen examples as float32 in [0, 1] and int32, on the device."""
    images = to_unit_interval(part.images(indices), where)
    return Batch(jnp.asarray(images), jnp.asarray(part.labels[indices], jnp.int32))


def to_unit_interval(images: np.ndarray, where: str) -> np.ndarray:
    """uint8 divided by 255; floats as they are, if all lie in [0, 1]."""
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(255)
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"{where}: images have dtype {images.dtype}; they must be uint8 (0 to 255), or floats "
            "in [0, 1]"
        )
    if not np.isfinite(images).all():
        raise ValueError(f"{where}: images have NaN or infinite values; remove those examples")
    if images.min() < 0 or images.max() > 1:
        raise ValueError(
            f"{where}: images have values in [{images.min():g}, {images.max():g}]; floats must lie "
            "in [0, 1]: divide by the largest value, or store them as uint8"
        )
    return images.astype(np.float32)
