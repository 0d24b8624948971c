import importlib.util
import io
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.images import image_hashes

from advmeta.data import load, split


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
