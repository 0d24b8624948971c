"""Several processes that train together: how they find each other, and what they agree on.

Each runs the same program on its own devices, and XLA moves what they exchange. The functions here
must be called by all of them; where there is one process, it agrees with itself.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from advmeta.sharding import LANES, check_mesh
from advmeta.types import Array, PyTree

_FROM_THE_CLUSTER = "auto"
_SECONDS_TO_LEAVE = 10  # after which a process that failed no longer waits for the others


@dataclasses.dataclass(frozen=True)
class Processes:
    """Options of a command that several processes can run together.

    Args:
      coordinator: HOST:PORT of process 0; or "auto" where the cluster's environment tells each
        process all three of these (Slurm, Open MPI, Kubernetes, Cloud TPU).
      num_processes: how many were started.
      process_id: which of them this is; process 0 prints and writes.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self):
        count, index = self.num_processes, self.process_id
        given = f"coordinator={self.coordinator!r}, num_processes={count}, process_id={index}"
        if self.coordinator in (None, _FROM_THE_CLUSTER):
            if (count, index) != (None, None):
                raise ValueError(
                    f"{given}: the last two go with the coordinator's HOST:PORT, as in "
                    "--coordinator 10.0.0.1:8476 --num-processes 2 --process-id 0"
                )
        elif ":" not in self.coordinator or count is None or index is None:
            raise ValueError(
                f"{given}: write --coordinator HOST:PORT --num-processes N --process-id I, or "
                "--coordinator auto where the cluster's environment says it"
            )
        elif not 0 <= index < count:
            raise ValueError(f"{given}: processes are numbered from 0 to num_processes - 1")


@contextlib.contextmanager
def joined(command: Processes) -> Iterator[None]:
    """Meets the other processes of the run, if there are any.

    Raises:
      ValueError: "auto" where JAX finds no cluster.
      ConnectionError: a process was lost, or a device failed.
    """
    if command.coordinator is None:
        yield
        return
    options: dict[str, Any] = {"shutdown_timeout_seconds": _SECONDS_TO_LEAVE}
    if command.coordinator != _FROM_THE_CLUSTER:
        options |= {
            "coordinator_address": command.coordinator,
            "num_processes": command.num_processes,
            "process_id": command.process_id,
        }
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        raise ValueError(
            f"--coordinator {command.coordinator}: {error} Give HOST:PORT with --num-processes and "
            "--process-id, or start the processes with srun, mpirun or on every host of a TPU slice"
        ) from error
    try:
        with _all_leave_together():
            yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not re.match("[A-Z_]+: ", str(error)):  # a status: XLA raises ValueErrors, too
            raise
        reason = str(error).splitlines()[0].rstrip(" .:")
        raise ConnectionError(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on: {reason}. If "
            "another process ended, start all of them again with --resume"
        ) from error


@contextlib.contextmanager
def _all_leave_together() -> Iterator[None]:
    """Process 0 may have something to write yet, and goes down with any other that leaves."""
    ended = None
    try:
        yield
    except (SystemExit, FloatingPointError) as end:  # comes to all of them, after the same step
        ended = end
    multihost_utils.sync_global_devices("the end")
    if ended is not None:
        raise ended


def device_mesh(lanes: int) -> Mesh | None:
    """Devices to split the lanes over; None for one.

    These are the devices of all processes; of a process by itself, as many as divide the lanes.

    Raises:
      ValueError: there are several processes, and their devices do not divide the lanes.
    """
    devices = jax.devices()
    if jax.process_count() == 1:
        devices = devices[: max(n for n in range(1, len(devices) + 1) if lanes % n == 0)]
    if len(devices) == 1:
        return None
    return check_mesh(Mesh(np.array(devices), (LANES,)), lanes)


def said_by_first(text: str = "") -> str:
    """What process 0 says, on every process; what the others say is not heard."""
    data = np.frombuffer(text.encode(), np.uint8)
    data = np.resize(data, int(multihost_utils.broadcast_one_to_all(np.int32(data.size))))
    return multihost_utils.broadcast_one_to_all(data).tobytes().decode()


def given_by_first(tree: PyTree) -> PyTree:
    """Arrays that process 0 alone has, on every process; the others pass some of the same shapes.

    Those may be split over all processes, so they are not read: only process 0 would not join in.
    """
    if jax.process_count() == 1:
        return tree

    def blank(leaf):
        shape = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        return np.zeros(shape.shape, shape.dtype)

    def fill(leaf, given):
        return jax.random.wrap_key_data(given) if _is_key(leaf) else jnp.asarray(given)

    mine = to_host(tree) if jax.process_index() == 0 else jax.tree.map(blank, tree)
    return jax.tree.map(fill, tree, multihost_utils.broadcast_one_to_all(mine))


def highest(*values: int) -> np.ndarray:
    """The highest of each value over all processes."""
    return multihost_utils.process_allgather(np.array(values)).reshape(-1, len(values)).max(axis=0)


def to_host(tree: PyTree) -> PyTree:
    """The whole of every array, also of one that is split over the devices of all processes."""

    def whole(leaf):
        if _is_key(leaf):
            leaf = jax.random.key_data(leaf)
        if not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.array(leaf)  # a copy: a CPU's memory is donated later

    return jax.tree.map(whole, tree)


def _is_key(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
