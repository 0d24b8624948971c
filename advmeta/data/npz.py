"""Data sets from an npz file, which may come from anywhere: nothing in it is ever unpickled."""

import os
from collections.abc import Mapping

import numpy as np

from advmeta.data.dataset import Part, Source

KEYS = ("train_image", "train_label", "test_image", "test_label")


def open_npz(path: str | os.PathLike[str]) -> Source:
    """Reads and checks the four arrays; see `advmeta.data.load`."""
    return open_arrays(_read(os.fspath(path)), path)


def open_arrays(arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> Source:
    """Checks the four arrays, wherever they are from; ``path`` is for messages."""
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {missing}; it must hold {list(KEYS)}, not {list(arrays)}")
    arrays = {key: np.asarray(arrays[key]) for key in KEYS}
    parts = [_part(arrays, part, path) for part in ("train", "test")]
    shapes = [arrays[f"{part}_image"].shape[1:3] + _channels(arrays[f"{part}_image"])
              for part in ("train", "test")]  # fmt: skip
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{path}: training images have shape {shapes[0]} and test images {shapes[1]}; they "
            "must be alike"
        )
    classes = 1 + max(int(part.labels.max()) for part in parts)
    return Source(*parts, num_classes=classes)


def _read(path: str) -> dict[str, np.ndarray]:
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with archive:
            return {key: archive[key] for key in archive.files if key in KEYS}
    # A damaged file can fail in the archive, the compression or the array header, each with errors
    # of its own (BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, ...).
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as an npz file of plain arrays ({error}); write it with "
            "numpy.savez_compressed(path, train_image=..., train_label=..., test_image=..., "
            "test_label=...), without object arrays: they are never unpickled"
        ) from error


def _part(arrays: dict[str, np.ndarray], part: str, path) -> Part:
    images, labels = arrays[f"{part}_image"], arrays[f"{part}_label"]
    if images.ndim not in (3, 4) or images.size == 0:
        raise ValueError(
            f"{path}: {part}_image has shape {images.shape}; it must be [n, h, w] or [n, h, w, c] "
            "with at least one example"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path}: {part}_label has dtype {labels.dtype}; labels must be class numbers of an "
            "integer dtype: y.astype('int32'), or y.argmax(-1) if they are one-hot"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}: {part}_label has shape {labels.shape}; there are {len(images)} images, so it "
            f"must be ({len(images)},)"
        )
    images = images.reshape(images.shape[:3] + _channels(images))
    return Part(labels, images.__getitem__)


def _channels(images: np.ndarray) -> tuple[int]:
    return (1,) if images.ndim == 3 else images.shape[3:]
