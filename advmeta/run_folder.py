"""The folder that a command writes, and the options that every command has."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import time
from collections.abc import Iterator

from advmeta import config_files


@dataclasses.dataclass(frozen=True)
class Shared:
    """Options of every command.

    Args:
      output: folder to write; made if it is not there. By default runs/COMMAND-DATE-TIME.
      seed: of everything that is random.
      config: a config.json of an earlier run, to start from; options on the command line win.
    """

    output: pathlib.Path | None = None
    seed: int = 0
    config: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Resumable(Shared):
    """Options of the commands that can be taken up again.

    Args:
      resume: go on with the run in the --output folder, where it was interrupted.
    """

    resume: bool = False


def new_folder(name: str) -> pathlib.Path:
    """Where a command writes if it is not told."""
    return pathlib.Path("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")


@contextlib.contextmanager
def open_folder(name: str, command: Shared) -> Iterator[tuple[pathlib.Path, bool]]:
    """The folder of a run of the command ``name``, with its config.json, for this process alone.

    Yields:
      The folder, and whether a run in it goes on.

    Raises:
      ValueError: the folder holds a run, and this is not to resume it or has other options; or
        another process is writing it.
    """
    resume = getattr(command, "resume", False)
    if resume and command.output is None:
        raise ValueError("--resume needs the --output folder of the run to take up")
    folder = command.output or new_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        exists = (folder / "config.json").exists()
        if exists and not resume:
            raise ValueError(
                f"{folder} already holds a run; give another --output, or remove it"
                + " (or go on with it: --resume)" * isinstance(command, Resumable)
            )
        if exists:
            _check_same(command, folder)
        else:
            fresh = dataclasses.replace(command, resume=False) if resume else command
            replace_file(folder / "config.json", config_files.to_json(fresh).encode())
        try:
            yield folder, exists
        except ValueError:
            if [path.name for path in folder.iterdir()] == ["config.json"]:
                (folder / "config.json").unlink()  # nothing has come of it: it holds no run
            raise


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out. The system drops the lock with the process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(
            f"another process is writing {folder}: wait for it, or give another --output"
        ) from error
    finally:
        os.close(descriptor)


def _check_same(command: Shared, folder: pathlib.Path) -> None:
    """Raises a ValueError that lists the options in which the run in the folder differs."""
    earlier = config_files.from_json(type(command), folder / "config.json")
    differing = differences(dataclasses.asdict(earlier), dataclasses.asdict(command))
    if differing:
        raise ValueError(
            f"{folder} holds a run with {'; '.join(differing)}: give the same options to resume "
            "it, or another --output"
        )


def differences(earlier: dict, now: dict, prefix: str = "") -> list[str]:
    """``option=earlier (now: ...)`` for every option that differs, those of nested configs too.

    Example:
      >>> from advmeta.run_folder import differences
      >>> differences({"seed": 0, "training": {"lanes": 4}}, {"seed": 0, "training": {"lanes": 2}})
      ['training.lanes=4 (now: 2)']
    """
    found = []
    for name, was in earlier.items():
        if not prefix and name in _OF_THE_CALL:
            continue
        if isinstance(was, dict) and isinstance(now[name], dict):
            found += differences(was, now[name], f"{prefix}{name}.")
        elif was != now[name]:
            found.append(f"{prefix}{name}={was!r} (now: {now[name]!r})")
    return found


# These do not change what comes out.
_OF_THE_CALL = ("output", "config", "resume", "checkpoint_seconds", "tensorboard")


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Writes beside the target, then takes its place: a kill leaves the old file or the new."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_bytes(content)
    os.replace(beside, path)
