import gzip
import hashlib
import importlib.util
import io
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advmeta.data import load, split
from advmeta.data.loading import EMBEDDED
from advmeta.types import Batch

CIFAR10 = pathlib.Path(__file__).parents[2] / "shared" / "data" / "cifar10_subset.npz"


def image_hashes(batch: Batch) -> list[bytes]:
    pixels = np.asarray(batch.x * 255).round().astype(np.uint8)
    return [hashlib.sha256(image.tobytes()).digest() for image in pixels]


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


# npz files


def arrays(**changes) -> dict[str, np.ndarray]:
    random = np.random.RandomState(0)
    plain = {
        "train_image": random.randint(0, 256, (12, 5, 4, 3)).astype(np.uint8),
        "train_label": np.arange(12) % 3,
        "test_image": random.randint(0, 256, (6, 5, 4, 3)).astype(np.uint8),
        "test_label": np.arange(6) % 3,
    }
    return {**plain, **changes}


def save(path: pathlib.Path, **contents) -> str:
    np.savez_compressed(path, **contents)
    return str(path)


def test_npz_holds_what_was_saved(tmp_path):
    saved = arrays()
    data = load(save(tmp_path / "set.npz", **saved))
    np.testing.assert_array_equal(data.train.x, saved["train_image"].astype(np.float32) / 255)
    np.testing.assert_array_equal(data.train.y, saved["train_label"])
    np.testing.assert_array_equal(data.test.x, saved["test_image"].astype(np.float32) / 255)
    np.testing.assert_array_equal(data.test.y, saved["test_label"])
    assert data.num_classes == 3
    assert load(tmp_path / "set.npz", num_classes=7).num_classes == 7


def test_npz_without_channels_and_with_floats(tmp_path):
    images = np.linspace(0, 1, 12 * 5 * 4).reshape(12, 5, 4)
    path = save(tmp_path / "set.npz", **arrays(train_image=images, test_image=images[:6]))
    data = load(path)
    assert data.train.x.shape == (12, 5, 4, 1)
    assert data.train.x.dtype == jnp.float32
    np.testing.assert_array_equal(data.train.x[..., 0], images.astype(np.float32))


IMAGES = arrays()["train_image"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_label": np.arange(11)}, r"train_label has shape \(11,\).*must be \(12,\)"),
        ({"test_label": np.zeros((6, 1), int)}, r"test_label has shape \(6, 1\)"),
        ({"train_label": np.zeros(12)}, "float64; labels must be class numbers"),
        ({"train_label": np.arange(12) - 1}, r"labels lie in \[-1, 10\]"),
        ({"train_image": IMAGES / 100}, r"values in \[0.*must lie in \[0, 1\]"),
        ({"train_image": np.full((12, 5, 4, 3), np.nan)}, "NaN"),
        ({"train_image": IMAGES.astype(np.int64)}, "int64; they must be uint8"),
        ({"train_image": IMAGES[:, 0, 0]}, r"\(12, 3\); it must be \[n, h, w\]"),
        ({"train_image": IMAGES[:0], "train_label": np.arange(0)}, "at least one example"),
        ({"test_image": IMAGES[:6, 1:]}, r"\(5, 4, 3\) and test images \(4, 4, 3\)"),
    ],
)
def test_npz_that_does_not_fit_is_refused(tmp_path, changes, message):
    path = save(tmp_path / "set.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_npz_without_a_key_says_which_and_what_it_has(tmp_path):
    contents = arrays()
    del contents["test_label"]
    with pytest.raises(ValueError, match=r"lacks \['test_label'\].*'train_image'"):
        load(save(tmp_path / "set.npz", **contents))


def test_there_is_no_such_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load(tmp_path / "absent.npz")


class Payload:
    """Leaves a file behind when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_is_ever_unpickled(tmp_path):
    mark = tmp_path / "unpickled"
    objects = np.array([Payload(mark)] * 12, dtype=object)
    in_archive = save(tmp_path / "objects.npz", **arrays(train_label=objects))
    bare = tmp_path / "pickle.npz"
    bare.write_bytes(pickle.dumps(Payload(mark)))
    for path in (in_archive, bare):
        with pytest.raises(ValueError, match="never unpickled"):
            load(path)
    assert not mark.exists()
    np.load(in_archive, allow_pickle=True)["train_label"]  # the control: it does go off
    assert mark.exists()


def test_damaged_npz_gives_a_value_error_and_nothing_else(tmp_path):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays())
    whole, path = buffer.getvalue(), tmp_path / "set.npz"
    for length in [0, 1, 3, 4, 10, 30, 100, *range(200, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read as an npz file"):
            load(path)
    random = np.random.RandomState(0)
    for _ in range(200):  # some flips do no harm; none may give another exception
        flipped = bytearray(whole)
        flipped[random.randint(len(whole))] ^= 1 << random.randint(8)
        path.write_bytes(flipped)
        try:
            load(path)
        except ValueError:
            continue


def test_single_array_and_compressed_text_are_no_npz(tmp_path):
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, IMAGES)
    (tmp_path / "text.npz").write_bytes(gzip.compress(b"train_image"))
    for name in ("array.npz", "text.npz"):
        with pytest.raises(ValueError, match="cannot be read as an npz file"):
            load(tmp_path / name)


@pytest.mark.skipif(not CIFAR10.exists(), reason=f"{CIFAR10.name} is not beside the checkout")
def test_cifar10_subset():
    cifar10 = load(CIFAR10, examples_per_class=50)
    assert cifar10.train.x.shape == (500, 32, 32, 3)
    assert cifar10.test.x.shape == (1000, 32, 32, 3)
    assert jnp.bincount(cifar10.test.y).tolist() == [100] * 10
    assert cifar10.num_classes == 10


# TensorFlow Datasets


def prepare(data_dir, name: str, parts: dict, features=None) -> None:
    """Writes a prepared data set as TFDS does, though without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    folder = data_dir / name / "1.0.0"
    folder.mkdir(parents=True)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )  # fmt: skip
    for part, (images, labels) in parts.items():
        path = folder / f"{name}-{part}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for image, label in zip(images, labels, strict=True):
            png = io.BytesIO()
            Image.fromarray(image.squeeze()).save(png, "png")
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(png.getvalue())
            example.features.feature["label"].int64_list.value.append(int(label))
            writer.write(example.SerializeToString())
        writer.close()
    infos = [
        tfds.core.SplitInfo(part, [len(labels)], num_bytes=1, filename_template=template)
        for part, (_, labels) in parts.items()
    ]
    channels = next(iter(parts.values()))[0][0].shape[-1]
    features = features or {
        "image": tfds.features.Image(shape=(None, None, channels)),
        "label": tfds.features.ClassLabel(num_classes=4),
    }
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=tfds.features.FeaturesDict(features), split_infos=infos,
        filename_template=template, check_data=False,
    )  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
def test_tfds_reads_a_prepared_set(tmp_path, channels):
    images = np.random.RandomState(0).randint(0, 256, (20, 5, 4, channels)).astype(np.uint8)
    labels = np.arange(20) % 4
    prepare(
        tmp_path, "tiny", {"train": (images[:12], labels[:12]), "test": (images[12:], labels[12:])}
    )
    data = load("tiny", data_dir=tmp_path)
    np.testing.assert_array_equal(data.train.x, images[:12].astype(np.float32) / 255)
    np.testing.assert_array_equal(data.test.x, images[12:].astype(np.float32) / 255)
    assert data.train.y.tolist() == labels[:12].tolist()
    assert data.num_classes == 4
    few = load("tiny", data_dir=tmp_path, examples_per_class=2)
    assert jnp.bincount(few.train.y).tolist() == [2] * 4
    of = dict(zip(image_hashes(data.train), data.train.y.tolist(), strict=True))
    assert [of[image] for image in image_hashes(few.train)] == few.train.y.tolist()


def test_tfds_without_a_test_split(tmp_path):
    images = np.random.RandomState(0).randint(0, 256, (20, 5, 4, 1)).astype(np.uint8)
    labels = np.arange(20) % 4
    prepare(tmp_path, "only_train", {"train": (images, labels)})
    data = load("only_train", data_dir=tmp_path)
    assert (len(data.train.y), len(data.test.y)) == (16, 4)
    assert len({*image_hashes(data.train), *image_hashes(data.test)}) == 20
    prepare(tmp_path, "validated", {"train": (images[:15], labels[:15]),
                                    "validation": (images[15:], labels[15:])})  # fmt: skip
    data = load("validated", data_dir=tmp_path)
    np.testing.assert_array_equal(data.test.x, images[15:].astype(np.float32) / 255)
    prepare(tmp_path, "only_test", {"test": (images, labels)})
    with pytest.raises(ValueError, match=r"splits \['test'\], and none of them is 'train'"):
        load("only_test", data_dir=tmp_path)


def test_tfds_set_in_the_default_format_gives_the_command_to_type(tmp_path):
    images = np.zeros((6, 5, 4, 1), np.uint8)
    prepare(tmp_path, "tiny", {"train": (images, [0] * 6), "test": (images, [0] * 6)})
    info = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        ValueError, match=r"not as array_record.*type\n  pip install 'advmeta\[tfds"
    ):
        load("tiny", data_dir=tmp_path)


def test_tfds_refuses_what_is_no_image_classification_of_one_size(tmp_path):
    import tensorflow_datasets as tfds

    sizes = [np.zeros((4 + i % 2, 4, 3), np.uint8) for i in range(6)]
    prepare(tmp_path, "photographs", {"train": (sizes, [0] * 6), "test": (sizes, [0] * 6)})
    with pytest.raises(ValueError, match=r"different sizes, such as \(4, 4, 3\) and \(5, 4, 3\)"):
        load("photographs", data_dir=tmp_path)
    numbers = {
        "image": tfds.features.Image(shape=(4, 4, 3)),
        "label": tfds.features.Scalar(np.int64),
    }
    prepare(tmp_path, "regression", {"train": (sizes[::2], [0] * 3)}, numbers)
    with pytest.raises(ValueError, match="not an image classification data set"):
        load("regression", data_dir=tmp_path)


def test_tfds_set_that_is_not_prepared_gives_the_command_to_type(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "tensorflow" else find_spec(name, *rest),
    )
    with pytest.raises(ValueError, match=r"pip install 'advmeta\[tfds\]'") as error:
        load("fashion_mnist", data_dir=tmp_path)
    command = str(error.value).splitlines()[-1]
    assert command.strip() == (
        f"python -c \"import advmeta; advmeta.data.load('fashion_mnist', data_dir='{tmp_path}')\""
    )


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


TFDS_DATA_DIR = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


@pytest.fixture(scope="module")
def fashion_mnist():
    if not (TFDS_DATA_DIR / "fashion_mnist").is_dir():
        pytest.skip(f"not prepared in {TFDS_DATA_DIR}: run .ci/prepare_fashion_mnist.py DATA_DIR")
    return load("fashion_mnist", data_dir=TFDS_DATA_DIR, examples_per_class=1000)


def test_fashion_mnist_through_tfds(fashion_mnist):
    fashion, small = fashion_mnist, load("fashion_small")
    assert fashion.train.x.shape == (10000, 28, 28, 1)
    assert fashion.test.x.shape == (10000, 28, 28, 1)
    assert jnp.bincount(fashion.test.y).tolist() == [1000] * 10
    assert np.asarray(fashion.test.x, np.float64).sum() * 255 == pytest.approx(573469082, rel=1e-6)
    # The mean of all training pixels, which everybody normalises with, is 0.2860.
    assert abs(float(fashion.train.x.mean()) - 0.2860) < 0.003
    # TFDS shuffles; still each image of the embedded subset is there, under the same label.
    label_of = dict(zip(image_hashes(fashion.test), fashion.test.y.tolist(), strict=True))
    assert [label_of[image] for image in image_hashes(small.test)] == small.test.y.tolist()


def test_a_classifier_learns_fashion_mnist(fashion_mnist):
    _, train = split(fashion_mnist.train, 5000)
    x, y = train.x.reshape(5000, -1), train.y
    optimizer = optax.adam(1e-2)

    def loss(weights, batch):
        logits = x[batch] @ weights
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]).mean()

    def step(carry, key):
        weights, state = carry
        gradient = jax.grad(loss)(weights, jax.random.randint(key, (128,), 0, len(y)))
        update, state = optimizer.update(gradient, state)
        return (weights + update, state), None

    weights = jnp.zeros((784, 10))
    keys = jax.random.split(jax.random.key(0), 300)
    (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), keys)
    logits = fashion_mnist.test.x.reshape(10000, -1) @ weights
    accuracy = (logits.argmax(1) == fashion_mnist.test.y).mean()
    assert accuracy > 0.75  # a linear model reaches 0.84 on all of it; chance is 0.10
