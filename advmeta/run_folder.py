"""The folder that a command writes, and the options that every command has."""

import dataclasses
import os
import pathlib
import time

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


def open_folder(name: str, command: Shared) -> pathlib.Path:
    """Makes the folder of a run of the command ``name`` and writes config.json into it.

    Raises:
      ValueError: the folder holds a run.
    """
    folder = command.output or pathlib.Path("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} already holds a run; give another --output, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "config.json", config_files.to_json(command).encode())
    return folder


def reopen_folder(command: Shared) -> pathlib.Path:
    """The folder of a run of the same command that was interrupted.

    Raises:
      ValueError: the run had other options.
    """
    path = command.output / "config.json"
    earlier = config_files.from_json(type(command), path)
    names = (field.name for field in dataclasses.fields(command) if field.name not in _OF_THE_CALL)
    differing = [name for name in names if getattr(earlier, name) != getattr(command, name)]
    if differing:
        was = ", ".join(f"{name}={getattr(earlier, name)!r}" for name in differing)
        raise ValueError(
            f"{command.output} holds a run with {was}; give the same options to resume it, or "
            "another --output"
        )
    return command.output


_OF_THE_CALL = ("output", "config", "resume")  # these do not change what comes out


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Writes beside the target, then takes its place: a kill leaves the old file or the new."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_bytes(content)
    os.replace(beside, path)
