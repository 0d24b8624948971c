import gzip
import io
import pathlib
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from advmeta.data import load

CIFAR10 = pathlib.Path(__file__).parents[2] / "shared" / "data" / "cifar10_subset.npz"


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
