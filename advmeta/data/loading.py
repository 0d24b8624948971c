"""A name -> a data set."""

import os

import numpy as np

from advmeta.data.dataset import Dataset, Source, check_labels, draw, to_batch
from advmeta.data.embedded import EMBEDDED
from advmeta.data.npz import open_arrays, open_npz
from advmeta.data.tfds import open_tfds
from advmeta.imports import import_function, is_import_name


def load(
    name: str | os.PathLike[str],
    *,
    train_examples: int | None = None,
    examples_per_class: int | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads a data set of images onto the device.

    Args:
      name: "digits" (1,797 8 x 8 images of scikit-learn, 1,000 of them to train) or
        "fashion_small" (the first 2,000 and 1,000 images of Fashion-MNIST), which need no network;
        the TFDS name of an image classification data set, such as "fashion_mnist" or "cifar10";
        or the path of an npz file with train_image and test_image ([n, h, w] or [n, h, w, c],
        uint8, or floats in [0, 1]) and train_label and test_label ([n], integers); or
        module:function, () -> a dict of those four arrays.
      train_examples: keep this many training examples, drawn at random.
      examples_per_class: or this many of each class.
      seed: of that draw. It changes neither the test set nor what it is drawn from.
      num_classes: by default the data set's own; for an npz file, the highest label plus one.
      data_dir: where TFDS keeps what it has prepared, by default its own choice.

    Returns:
      `Dataset` with ``train`` and ``test`` (`Batch`es of x [n, h, w, c] float32 in [0, 1] and
      y [n] int32), ``num_classes`` and ``name``. A TFDS set without a test split gives its
      validation split, and without either a fifth of its training set.

    Raises:
      ValueError: an unknown name; a TFDS set that is not prepared where TensorFlow is absent; more
        examples than there are; images out of [0, 1], NaN, or of different sizes; labels that are
        floats, out of range or of another number; a file that is no such npz.

    Example:
      >>> digits = advmeta.data.load("digits", examples_per_class=10, seed=1)
      >>> digits.train.x.shape, digits.test.x.shape, digits.num_classes
      ((100, 8, 8, 1), (797, 8, 8, 1), 10)
      >>> jnp.bincount(digits.train.y).tolist()
      [10, 10, 10, 10, 10, 10, 10, 10, 10, 10]
    """
    name = os.fspath(name)
    source = _open(name, data_dir)
    classes = source.num_classes if num_classes is None else num_classes
    check_labels(source.train.labels, classes, f"{name}, train")
    check_labels(source.test.labels, classes, f"{name}, test")
    chosen = draw(source.train.labels, classes, train_examples, examples_per_class, seed)
    train = to_batch(source.train, chosen, f"{name}, train")
    test = to_batch(source.test, np.arange(len(source.test.labels)), f"{name}, test")
    return Dataset(train, test, classes, name)


def _open(name: str, data_dir) -> Source:
    if name in EMBEDDED:
        return EMBEDDED[name]()
    if name.lower().endswith(".npz"):
        return open_npz(name)
    if is_import_name(name):
        return open_arrays(import_function(name, "data")(), name)
    return open_tfds(name, data_dir)
