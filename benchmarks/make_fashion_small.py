"""Makes advmeta/data/fashion_small.npz: the first 2,000 train and 1,000 test images, untouched.

    apt-get install dataset-fashion-mnist
    python benchmarks/make_fashion_small.py /usr/share/datasets/fashion-mnist

It holds real images, so that a machine without a network has a second data set to transfer to.
"""

import gzip
import pathlib
import sys

import numpy as np

TRAIN, TEST = 2_000, 1_000
TARGET = pathlib.Path(__file__).parents[1] / "advmeta" / "data" / "fashion_small.npz"


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads an IDX file: two zero bytes, the type (8: uint8), the rank, the sizes, the values."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of bytes")
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def main(folder: str) -> None:
    source = pathlib.Path(folder)
    np.savez_compressed(
        TARGET,
        train_image=read_idx(source / "train-images-idx3-ubyte.gz")[:TRAIN, :, :, None],
        train_label=read_idx(source / "train-labels-idx1-ubyte.gz")[:TRAIN],
        test_image=read_idx(source / "t10k-images-idx3-ubyte.gz")[:TEST, :, :, None],
        test_label=read_idx(source / "t10k-labels-idx1-ubyte.gz")[:TEST],
    )
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
