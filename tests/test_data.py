import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.images import image_hashes

from advmeta.data import load, split
from advmeta.data.loading import EMBEDDED
from advmeta.types import Batch

# Known facts of the data sets


def test_digits_are_those_of_scikit_learn():
    digits = load("digits")
    assert digits.train.x.shape == (1000, 8, 8, 1)
    assert digits.test.x.shape == (797, 8, 8, 1)
    assert digits.num_classes == 10
    assert digits.name == "digits"
    labels = jnp.concatenate([digits.train.y, digits.test.y])
    # The class counts of `sklearn.datasets.load_digits`, and the sum of its pixels (0 to 16).
    assert jnp.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    pixels = np.concatenate([digits.train.x, digits.test.x]).astype(np.float64) * 16
    assert pixels.sum() == 561718
    assert sorted(set(pixels.ravel())) == list(range(17))


def test_digits_are_split_without_overlap_and_always_alike():
    from sklearn.datasets import load_digits

    digits = load("digits")
    rows = np.concatenate([digits.train.x, digits.test.x]).reshape(1797, 64) * 16
    original = load_digits().data
    assert sorted(map(tuple, rows)) == sorted(map(tuple, original))  # each image exactly once
    # Images of the data set that come first in the training set, whatever the version of numpy.
    assert [np.flatnonzero((original == row).all(1))[0] for row in rows[:3]] == [1081, 1707, 927]


def test_fashion_small_is_the_beginning_of_fashion_mnist():
    fashion = load("fashion_small")
    assert fashion.train.x.shape == (2000, 28, 28, 1)
    assert fashion.test.x.shape == (1000, 28, 28, 1)
    # The published set begins with an ankle boot (9) and two T-shirts (0); the test set with an
    # ankle boot, a pullover (2) and two trousers (1).
    assert fashion.train.y[:5].tolist() == [9, 0, 0, 3, 0]
    assert fashion.test.y[:5].tolist() == [9, 2, 1, 1, 6]
    # The mean pixel of all of Fashion-MNIST is 0.2860; 2,000 images are within a percent of it.
    assert abs(float(fashion.train.x.mean()) - 0.2860) < 0.01


@pytest.mark.parametrize("name", EMBEDDED)
def test_arrays_are_nhwc_float32_in_the_unit_interval(name):
    data = load(name)
    for batch in (data.train, data.test):
        assert isinstance(batch.x, jax.Array)
        assert batch.x.dtype == jnp.float32
        assert batch.y.dtype == jnp.int32
        assert batch.x.ndim == 4
        assert batch.y.shape == batch.x.shape[:1]
        assert (batch.x.min(), batch.x.max()) == (0, 1)
        assert (batch.y.min(), batch.y.max()) == (0, data.num_classes - 1)


def test_what_is_not_needed_is_not_imported():
    code = (
        "import sys, advmeta; print('sklearn' in sys.modules, 'tensorflow_datasets' in sys.modules)"
        "; advmeta.data.load('digits'); print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False"]


# The low-data regime and the validation split


def test_train_examples_draws_that_many_without_repetition():
    everything, few = load("fashion_small"), load("fashion_small", train_examples=200, seed=1)
    drawn, of = image_hashes(few.train), image_hashes(everything.train)
    assert len(set(drawn)) == 200
    label_of = dict(zip(of, everything.train.y.tolist(), strict=True))
    assert [label_of[image] for image in drawn] == few.train.y.tolist()
    assert (few.test.x == everything.test.x).all()


def test_examples_per_class_draws_that_many_of_each():
    few = load("digits", examples_per_class=7, seed=3)
    assert jnp.bincount(few.train.y).tolist() == [7] * 10
    assert few.train.y[:10].tolist() != [0] * 7 + [1] * 3  # and mixes them


@pytest.mark.parametrize("regime", [{"train_examples": 50}, {"examples_per_class": 5}])
def test_the_draw_is_fixed_by_the_seed(regime):
    first, again, other = (load("digits", **regime, seed=seed).train for seed in (1, 1, 2))
    assert (first.x == again.x).all()
    assert (first.y == again.y).all()
    assert (first.x != other.x).any()


@pytest.mark.parametrize("validation", [0.25, 250])
def test_split_parts_are_disjoint_and_complete(validation):
    batch = Batch(jnp.arange(1000.0)[:, None], jnp.arange(1000))
    train, held_out = split(batch, validation, seed=4)
    assert held_out.y.shape == (250,)
    assert sorted(train.y.tolist() + held_out.y.tolist()) == list(range(1000))
    assert (train.x[:, 0] == train.y).all()
    assert (held_out.y == split(batch, validation, seed=4)[1].y).all()
    assert (held_out.y != split(batch, validation, seed=5)[1].y).any()


@pytest.mark.parametrize("validation", [0, 10, 0.01, 1.0, 2.0, -3, float("nan")])
def test_split_refuses_an_empty_part(validation):
    batch = Batch(jnp.zeros((10, 2)), jnp.zeros(10, jnp.int32))
    with pytest.raises(ValueError, match="from 1 to 9"):
        split(batch, validation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_examples": 1001}, "from 1 to 1000: there are 1000 training examples"),
        ({"train_examples": 0}, "train_examples=0 must be"),
        ({"train_examples": 0.5}, "train_examples=0.5 must be a whole number"),
        ({"examples_per_class": 95}, "from 1 to 87: there are 87 .* of class 7"),
        ({"train_examples": 50, "examples_per_class": 5}, "one of the two"),
        ({"num_classes": 5}, r"labels lie in \[0, 9\], but there are 5 classes"),
    ],
)
def test_impossible_requests_say_what_is_possible(arguments, message):
    with pytest.raises(ValueError, match=message):
        load("digits", **arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashionmnist", "did you mean 'fashion_mnist'"),
        ("digts", "did you mean 'digits'.*'digits', 'fashion_small'.*TensorFlow Datasets.*npz"),
        ("cifar10.npy", "a file that ends in .npz"),
        ("mnist:99.0.0", "cannot be loaded at version 99.0.0"),
        ("", "is no data set"),
    ],
)
def test_unknown_names_list_the_known_ones(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        load(name, data_dir=tmp_path)
