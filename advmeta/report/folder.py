"""A run folder, or several -> plots/*.png and report.html."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from advmeta.report.figures import Plot

FILES = ("config.json", "card.json", "metrics.jsonl", "results.json", "curves.json", "sanity.json",
         "behaviour.json", "twins.json")  # fmt: skip


class Run(NamedTuple):
    """What a run left, empty where it left nothing."""

    name: str
    config: dict[str, Any]
    card: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: list[dict[str, Any]]
    curves: dict[str, list[dict[str, Any]]]
    sanity: list[dict[str, Any]]
    behaviour: dict[str, list[dict[str, Any]]]
    twins: dict[str, list[Any]]


def write(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes the plots and the page of a run into its folder.

    The page holds all that it shows and asks for nothing from elsewhere. A part whose file is
    absent is left out. Each file is replaced in one go: a reader never sees half of it.

    Args:
      folder: of the run, with any of config.json, card.json, metrics.jsonl, results.json,
        curves.json, sanity.json, behaviour.json and twins.json.

    Returns:
      The path of ``report.html``; beside it stands ``plots`` with a PNG of each plot, such as
      ``plots/transfer.png``.

    Raises:
      ValueError: there is no such folder, none of the files is in it, or one of them is not
        JSON of the right kind.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = pathlib.Path(folder) / "metrics.jsonl"
      ...     _ = file.write_text('{"outer_step": 50, "meta_loss": 1.9}')
      ...     page = advmeta.report.write(folder)
      ...     page.name, [path.name for path in page.parent.glob("plots/*")]
      ('report.html', ['meta_training.png'])
    """
    from advmeta.report.page import page
    from advmeta.report.plots import plots

    folder = pathlib.Path(folder)
    run = read(folder)
    made = plots(run)
    return _write(folder, page(run, made), made)


def compare(
    folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> pathlib.Path:
    """Writes a page that holds several runs against each other, with its plots.

    Rows of the transfer table and curves are named after the run they are of, but for baselines
    that did the same in all of them. Settings that differ stand first.

    Args:
      folders: of the runs, at least two; see `write`.
      output: the folder to write; made if it is not there.

    Returns:
      The path of ``report.html`` in it.

    Raises:
      ValueError: fewer than two runs, an output that is itself a run's folder, or as `write`.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as top:
      ...     for name, loss in (("short", 2.5), ("long", 1.9)):
      ...         folder = pathlib.Path(top) / name
      ...         folder.mkdir()
      ...         record = f'{{"outer_step": 50, "meta_loss": {loss}}}'
      ...         _ = (folder / "metrics.jsonl").write_text(record)
      ...     runs = [pathlib.Path(top) / "short", pathlib.Path(top) / "long"]
      ...     advmeta.report.compare(runs, pathlib.Path(top) / "both").name
      'report.html'
    """
    from advmeta.report.comparison import compared
    from advmeta.report.page import page, plain_table
    from advmeta.report.plots import plots

    if len(folders) < 2:
        raise ValueError(f"folders={list(map(str, folders))}: give at least two runs to compare")
    output = pathlib.Path(output)
    if any((output / name).exists() for name in FILES):
        raise ValueError(f"{output} is itself the folder of a run; give another output")
    merged, names, differing = compared([read(pathlib.Path(folder)) for folder in folders])
    made = plots(merged)
    output.mkdir(parents=True, exist_ok=True)
    settings = plain_table(("setting", *names), differing) if differing else ""
    return _write(output, page(merged, made, settings), made)


def _write(folder: pathlib.Path, page: str, plots: Sequence[Plot]) -> pathlib.Path:
    from advmeta.report.figures import to_png

    (folder / "plots").mkdir(exist_ok=True)
    for plot in plots:
        _replace(folder / "plots" / f"{plot.name}.png", to_png(plot))
    target = folder / "report.html"
    _replace(target, page.encode())
    return target


def read(folder: pathlib.Path) -> Run:
    """Reads what there is; see `write`."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; give the one that a run wrote")
    if not any((folder / name).is_file() for name in FILES):
        raise ValueError(f"{folder} holds none of {', '.join(FILES)}: there is nothing to report")
    config, card, curves, behaviour, twins = (
        _load(folder / f"{name}.json", json.loads, dict)
        for name in ("config", "card", "curves", "behaviour", "twins")
    )
    metrics = _load(folder / "metrics.jsonl", _lines, list)
    results, sanity = (
        _load(folder / name, json.loads, list) for name in ("results.json", "sanity.json")
    )
    return Run(folder.resolve().name, config, card, metrics, results, curves, sanity, behaviour,
               twins)  # fmt: skip


def _load(path: pathlib.Path, parse: Callable[[str], object], kind: type) -> Any:
    if not path.is_file():
        return kind()
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the JSON, or of the encoding
        raise ValueError(f"{path} is not what a run writes: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must hold a {kind.__name__}")
    return content


def _lines(text: str) -> list[dict]:
    """One dict a line. The last line may be cut short: the run was stopped as it was written."""
    lines = [line for line in text.splitlines() if line.strip()]
    records = [json.loads(line) for line in lines[:-1]]
    try:
        records += [json.loads(line) for line in lines[-1:]]
    except json.JSONDecodeError:
        if not records:
            raise
    return records


def _replace(path: pathlib.Path, content: bytes) -> None:
    """Writes beside the target, then takes its place."""
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(beside, 0o666 & ~mask)  # mkstemp keeps it to its owner
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
