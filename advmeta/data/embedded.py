"""The data sets that need no network."""

from importlib import resources

import numpy as np

from advmeta.data.dataset import Part, Source, permutation
from advmeta.data.npz import open_npz

DIGITS_TRAIN = 1_000  # of 1,797
SPLIT_SEED = 0


def open_digits(split_seed: int = SPLIT_SEED) -> Source:
    """scikit-learn's 8 x 8 digits: 1,000 to train and 797 to test, split by the seed."""
    from sklearn.datasets import load_digits  # here: it takes longer than all of `import advmeta`

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)  # counts from 0 to 16: exact
    order = permutation(len(labels), split_seed)
    train, test = (
        Part(labels[part], images[part].__getitem__)
        for part in (order[:DIGITS_TRAIN], order[DIGITS_TRAIN:])
    )
    return Source(train, test, num_classes=10)


def open_fashion_small() -> Source:
    """The first 2,000 training and 1,000 test images of Fashion-MNIST, 28 x 28."""
    with resources.as_file(resources.files("advmeta.data") / "fashion_small.npz") as path:
        return open_npz(path)


EMBEDDED = {"digits": open_digits, "fashion_small": open_fashion_small}
