"""Records of a meta-training as TensorBoard event files."""

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator

import numpy as np


@contextlib.contextmanager
def event_log(folder: pathlib.Path, records: Iterable[dict]) -> Iterator[Callable[[dict], None]]:
    """Fills a folder of its own with event files of the records; yields a function that adds one.

    What the folder held is removed: a run that was killed may have written more than it kept.
    """
    from tensorboard.summary import Writer  # of an extra

    shutil.rmtree(folder, ignore_errors=True)
    writer = Writer(str(folder))

    def add(record: dict) -> None:
        for name in record.keys() - {"outer_step"}:
            writer.add_scalar(name, np.float32(record[name]), record["outer_step"])
        writer.flush()

    for record in records:
        add(record)
    try:
        yield add
    finally:
        writer.close()
