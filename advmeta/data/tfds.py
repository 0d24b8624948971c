"""Data sets of TensorFlow Datasets: read without TensorFlow, prepared with it where it is there.

Only the ``array_record`` format can be read without TensorFlow. `tensorflow_datasets` is imported
where it is needed, so that ``import advmeta`` stays fast.
"""

import difflib
import importlib.util
import os
from typing import Any

import numpy as np

from advmeta.data.dataset import Part, Source, permutation
from advmeta.data.embedded import EMBEDDED

FORMAT = "array_record"
HELD_OUT = 0.2  # of the training set, where a data set has neither a test nor a validation split
SPLIT_SEED = 0


def open_tfds(name: str, data_dir: str | os.PathLike[str] | None) -> Source:
    """Reads labels and encoded images; images are decoded when asked for, the chosen ones only."""
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        _prepare(builder, name, data_dir)
    image, label = _feature_keys(builder.info, name)
    classes = builder.info.features[label].num_classes
    splits = builder.info.splits
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits:
        raise ValueError(f"{name} has the splits {sorted(splits)}, and none of them is 'train'")
    train_part = _read(builder, name, "train", image, label)
    if test is not None:
        return Source(train_part, _read(builder, name, test, image, label), classes)
    order = permutation(len(train_part.labels), SPLIT_SEED)
    count = round(HELD_OUT * len(order))
    return Source(_subset(train_part, order[count:]), _subset(train_part, order[:count]), classes)


def _builder(name: str, data_dir) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir)
    # AssertionError: a version that does not exist. ImportError: a namespace such as huggingface.
    except (ValueError, AssertionError, ImportError) as error:
        raise ValueError(_unknown(name, error)) from error


def _unknown(name: str, error: Exception) -> str:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    known = [*EMBEDDED, *tfds.list_builders(with_community_datasets=False)]
    similar = [other for other in difflib.get_close_matches(name, known) if other != name]
    listed = isinstance(error, DatasetNotFoundError)  # with all names: pages
    return (
        f"{name!r} is no data set that can be opened"
        + (f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ".")
        + f" Give an embedded one, {sorted(EMBEDDED)}; the name of an image classification data "
        "set of TensorFlow Datasets, such as 'fashion_mnist', 'cifar10' or 'emnist/balanced'; or "
        "the path of a file that ends in .npz."
        + ("" if listed else f" TensorFlow Datasets says: {error}")
    )


def _prepare(builder, name: str, data_dir) -> None:
    import tensorflow_datasets as tfds

    if importlib.util.find_spec("tensorflow") is None:
        argument = "" if data_dir is None else f", data_dir={os.fspath(data_dir)!r}"
        raise ValueError(
            f"{name} is not prepared in {builder.data_dir} as {FORMAT}, and preparing it needs "
            "TensorFlow (reading it does not). Type\n"
            "  pip install 'advmeta[tfds]'\n"
            f'  python -c "import advmeta; advmeta.data.load({name!r}{argument})"'
        )
    # What TFDS mirrors is in another format than the one that is read here.
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config, file_format=FORMAT)


def _feature_keys(info, name: str) -> tuple[str, str]:
    """The names under which the image and the label are stored."""
    import tensorflow_datasets as tfds

    features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
    images = [key for key, f in features.items() if isinstance(f, tfds.features.Image)]
    labels = [key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    if info.supervised_keys and info.supervised_keys[0] in images:
        images = [info.supervised_keys[0]]
    if info.supervised_keys and info.supervised_keys[1] in labels:
        labels = [info.supervised_keys[1]]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{name} is not an image classification data set: it has the images {images} and the "
            f"class labels {labels} among {sorted(features)}, where one of each is needed"
        )
    return images[0], labels[0]


def _read(builder, name: str, split: str, image: str, label: str) -> Part:
    import tensorflow_datasets as tfds

    try:
        records = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise ValueError(
            f"{name} is prepared in {builder.data_dir}, but not as {FORMAT}, the format that can "
            "be read without TensorFlow. Prepare it in another folder: type\n"
            "  pip install 'advmeta[tfds]'\n"
            f"  python -c \"import advmeta; advmeta.data.load({name!r}, data_dir='ANOTHER')\""
        ) from error
    feature = builder.info.features[image]

    def decode(encoded: list[bytes]) -> np.ndarray:
        images = [feature.decode_example_np(one) for one in encoded]
        sizes = sorted({one.shape for one in images})
        if len(sizes) > 1:
            raise ValueError(
                f"{name} has images of different sizes, such as {sizes[0]} and {sizes[-1]}; a "
                "batch needs one: resize them, and load them from an npz file"
            )
        return np.stack(images)

    # Before everything is read into memory: sets of photographs tend to be large.
    decode([record[image] for record in records.__getitems__(list(range(min(64, len(records)))))])
    rows = records.__getitems__(list(range(len(records))))
    encoded = [row[image] for row in rows]
    return Part(
        labels=np.asarray([row[label] for row in rows]),
        images=lambda indices: decode([encoded[i] for i in indices]),
    )


def _subset(part: Part, chosen: np.ndarray) -> Part:
    return Part(part.labels[chosen], lambda indices: part.images(chosen[indices]))
