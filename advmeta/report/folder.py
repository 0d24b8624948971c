"""A run folder -> plots/*.png and report.html in it."""

import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

FILES = ("config.json", "card.json", "metrics.jsonl", "results.json", "curves.json", "sanity.json")


class Run(NamedTuple):
    """What a run left, empty where it left nothing."""

    name: str
    config: dict
    card: dict
    metrics: list[dict]
    results: list[dict]
    curves: dict[str, list[dict]]
    sanity: list[dict]


def write(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes the plots and the page of a run into its folder.

    The page holds all that it shows and asks for nothing from elsewhere. A part whose file is
    absent is left out. Each file is replaced in one go: a reader never sees half of it.

    Args:
      folder: of the run, with any of config.json, card.json, metrics.jsonl, results.json,
        curves.json and sanity.json.

    Returns:
      The path of ``report.html``; beside it stand ``plots/transfer.png``,
      ``plots/learning_curves.png``, ``plots/epsilon.png`` and ``plots/meta_training.png``.

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
    from advmeta.report.plots import plots, to_png

    folder = pathlib.Path(folder)
    run = read(folder)
    made = plots(run)
    (folder / "plots").mkdir(exist_ok=True)
    for plot in made:
        _replace(folder / "plots" / f"{plot.name}.png", to_png(plot))
    target = folder / "report.html"
    _replace(target, page(run, made).encode())
    return target


def read(folder: pathlib.Path) -> Run:
    """Reads what there is; see `write`."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; give the one that a run wrote")
    if not any((folder / name).is_file() for name in FILES):
        raise ValueError(f"{folder} holds none of {', '.join(FILES)}: there is nothing to report")
    config, card, curves = (
        _load(folder / name, json.loads, dict)
        for name in ("config.json", "card.json", "curves.json")
    )
    metrics = _load(folder / "metrics.jsonl", _lines, list)
    results, sanity = (
        _load(folder / name, json.loads, list) for name in ("results.json", "sanity.json")
    )
    return Run(folder.resolve().name, config, card, metrics, results, curves, sanity)


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
