"""Frozen configs to JSON and back."""

import dataclasses
import json
import os
import pathlib
import types
import typing
from typing import Any

Config = typing.TypeVar("Config")


def to_json(config: Any) -> str:
    """A config as JSON text; `from_json` reads it back to an equal config."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(cls: type[Config], path: str | os.PathLike[str]) -> Config:
    """Reads a config of this class; what the file leaves out keeps its default.

    Raises:
      ValueError: no such file, not JSON, or a field that the config does not have.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a JSON config: {error}") from error
    return _build(cls, values, where=str(path))


def _build(kind: Any, value: Any, where: str) -> Any:
    """The value as the annotated kind: dataclasses from dicts, tuples from lists."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        known = [a for a in arguments if a is not types.NoneType]
        return None if value is None else _build(known[0], value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a JSON object for {kind.__name__}, not {value!r}")
        hints = typing.get_type_hints(kind)
        unknown = sorted(value.keys() - hints.keys())
        if unknown:
            raise ValueError(f"{where} has {unknown}; {kind.__name__} knows {list(hints)}")
        needed = {
            field.name for field in dataclasses.fields(kind)
            if field.default is field.default_factory is dataclasses.MISSING
        }  # fmt: skip
        if missing := sorted(needed - value.keys()):
            raise ValueError(f"{where} lacks {missing}, and {kind.__name__} has no default for it")
        return kind(**{k: _build(hints[k], v, f"{where}: {k}") for k, v in value.items()})
    if origin is typing.Literal and value not in arguments:
        raise ValueError(f"{where} must be one of {list(arguments)}, not {value!r}")
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, not {value!r}")
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise ValueError(f"{where} must have {len(kinds)} entries, not {value!r}")
        return tuple(_build(k, v, where) for k, v in zip(kinds, value, strict=True))
    if kind is pathlib.Path and isinstance(value, str):
        return pathlib.Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and (
        not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)
    ):
        raise ValueError(f"{where} must be of type {kind.__name__}, not {value!r}")
    return value
