"""Checkpoints of a long run: Orbax's, with a digest, so that damage is seen."""

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advmeta.types import PyTree

KEPT = 3  # so that a damaged checkpoint leaves two to go back to


class Restored(NamedTuple):
    """What a checkpoint held, and what was passed over to get to it."""

    step: int
    arrays: PyTree
    record: dict  # plain values, as JSON holds them
    damaged: tuple[str, ...]  # newer checkpoints that could not be read, each with the reason


class Checkpoints:
    """A folder of checkpoints, each whole or not there at all, of which the newest few are kept.

    Args:
      folder: made if it is not there.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
      ...     checkpoints.save(10, {"w": jnp.arange(3.0)}, {"loss": 0.5})
      ...     restored = checkpoints.newest(like={"w": jnp.zeros(3)})
      >>> restored.step, restored.arrays["w"].tolist(), restored.record
      (10, [0.0, 1.0, 2.0], {'loss': 0.5})
    """

    def __init__(self, folder: pathlib.Path | str):
        import orbax.checkpoint as ocp  # only here: it takes most of a second to import

        self.folder = pathlib.Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        # This process alone writes, and waits for no other.
        me = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, cleanup_tmp_directories=True, create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=me, active_processes={me}
            ),
        )  # fmt: skip
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._writing():
            self._manager.close()  # waits for what is being written

    def save(self, step: int, arrays: PyTree, record: dict) -> None:
        """Writes in the background what these arrays are now, so they may be donated afterwards.

        Raises:
          OSError: this or the save before it failed, on a full disk for one. What was written of it
            is not taken for a checkpoint.
        """
        import orbax.checkpoint as ocp

        plain = jax.tree.map(_to_numpy, arrays)
        leaves = {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(plain))}
        about = {"record": record, "digest": _digest(leaves, record)}
        parts = ocp.args.Composite(
            arrays=ocp.args.StandardSave(leaves), about=ocp.args.JsonSave(about)
        )
        with self._writing():
            self._manager.save(step, args=parts)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever Orbax and TensorStore raise of a disk
            raise OSError(
                f"a checkpoint could not be written to {self.folder} ({_first_line(error)}): is "
                "the disk full? What was written before is whole"
            ) from error

    def newest(self, like: PyTree) -> Restored | None:
        """The newest checkpoint that is whole, or None where there is none.

        Args:
          like: arrays, or their shapes, as `save` was given them.

        Damaged ones that are newer are moved beside the folder; if all are, nothing is.

        Raises:
          ValueError: there are checkpoints and all are damaged, or one is of other arrays.
        """
        self._manager.wait_until_finished()
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                leaves, record = self._read(step)
            except Exception as error:  # whatever Orbax raises on bytes that it did not write
                damaged[step] = f"checkpoint {step}: {_first_line(error)}"
                continue
            for newer in damaged:
                self._set_aside(newer)
            return Restored(step, _fill(like, leaves), record, tuple(damaged.values()))
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.folder} is whole ({'; '.join(damaged.values())}): remove "
                "the folder of the run to start anew"
            )
        return None

    def _read(self, step: int) -> tuple[dict[str, np.ndarray], dict]:
        import orbax.checkpoint as ocp

        parts = ocp.args.Composite(arrays=ocp.args.StandardRestore(), about=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=parts)
        leaves = {name: np.asarray(leaf) for name, leaf in found["arrays"].items()}
        about = found["about"]
        if _digest(leaves, about["record"]) != about["digest"]:
            raise ValueError("its content is not what was written")
        return leaves, about["record"]

    def _set_aside(self, step: int) -> None:
        """Out of the way of the checkpoint that the run will write at this step again."""
        aside = self.folder.with_name(f"{self.folder.name}-damaged-{step}")
        if aside.exists():  # the step was damaged once before
            shutil.rmtree(aside)
        (self.folder / str(step)).rename(aside)
        self._manager.reload()


def _to_numpy(leaf) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.array(leaf)  # a copy: on a CPU, asarray would look at memory that is donated later


def _digest(leaves: dict[str, np.ndarray], record: dict) -> str:
    sha = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(leaves):
        leaf = leaves[name]
        sha.update(json.dumps([name, str(leaf.dtype), list(leaf.shape)]).encode())
        sha.update(leaf.tobytes())
    return sha.hexdigest()


def _fill(like: PyTree, leaves: dict[str, np.ndarray]) -> PyTree:
    wanted, structure = jax.tree.flatten(like)
    if len(wanted) != len(leaves):
        raise ValueError(f"the checkpoint holds {len(leaves)} arrays where {len(wanted)} belong")
    filled = []
    for place, found in zip(wanted, (leaves[name] for name in sorted(leaves)), strict=True):
        if jnp.issubdtype(place.dtype, jax.dtypes.prng_key):
            filled.append(jax.random.wrap_key_data(jnp.asarray(found)))
            continue
        if (place.shape, place.dtype) != (found.shape, found.dtype):
            raise ValueError(
                f"the checkpoint holds {found.dtype}{list(found.shape)} where "
                f"{place.dtype}{list(place.shape)} belongs"
            )
        filled.append(jnp.asarray(found))
    return jax.tree.unflatten(structure, filled)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
