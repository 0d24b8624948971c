"""Several runs as one: what they share stands there once, what differs under each run's name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from advmeta.report.folder import Run
from advmeta.report.records import Row, flat, row_of


class Comparison(NamedTuple):
    merged: Run
    names: tuple[str, ...]
    differing: list[tuple[str, ...]]  # a setting, and its value in each run


def compared(runs: Sequence[Run]) -> Comparison:
    """Merges runs for a page.

    A baseline that did the same in all runs that have it, seed by seed, keeps its name; every other
    row is named after its run, and the meta-optimizer's always are. Seconds are not compared.
    """
    names = _distinct([run.name for run in runs])
    parts = {
        name: {"results": run.results, **run.curves} for name, run in zip(names, runs, strict=True)
    }
    merged = _merged(parts)
    metrics = [
        {**record, "run": name}
        for name, run in zip(names, runs, strict=True)
        for record in run.metrics
    ]
    empty = Run(" · ".join(names), {}, {}, [], [], {}, [], {}, {})
    whole = empty._replace(metrics=metrics, results=merged.pop("results"), curves=merged)
    settings = [dict(flat(run.config)) for run in runs]
    known = dict.fromkeys(name for each in settings for name in each)
    lines = [(name, *(each.get(name, "-") for each in settings)) for name in known]
    return Comparison(whole, names, [line for line in lines if len(set(line[1:])) > 1])


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """A number behind every name that came before."""
    return tuple(
        f"{name} ({names[:place].count(name) + 1})" if name in names[:place] else name
        for place, name in enumerate(names)
    )


def _merged(parts: Mapping[str, Mapping[str, list[dict]]]) -> dict[str, list[dict]]:
    rows = dict.fromkeys(row_of(r) for lists in parts.values() for rs in lists.values() for r in rs)
    merged: dict[str, list[dict]] = {"results": []}
    for row in rows:
        of_runs = {name: _of(row, lists) for name, lists in parts.items()}
        of_runs = {name: lists for name, lists in of_runs.items() if any(lists.values())}
        first, *others = of_runs.values()
        shared = not row.meta and all(_timeless(each) == _timeless(first) for each in others)
        for name, lists in list(of_runs.items())[: 1 if shared else None]:
            optimizer = row.optimizer if shared else f"{row.optimizer} [{name}]"
            for kind, records in lists.items():
                merged.setdefault(kind, []).extend({**r, "optimizer": optimizer} for r in records)
    return merged


def _of(row: Row, lists: Mapping[str, list[dict]]) -> dict[str, list[dict]]:
    return {kind: [r for r in records if row_of(r) == row] for kind, records in lists.items()}


def _timeless(lists: Mapping[str, list[dict]]) -> str:
    """Text, since NaN differs from itself."""
    return json.dumps(
        [
            [{k: v for k, v in r.items() if k != "seconds"} for r in rs]
            for rs in lists.values()
            if rs
        ]
    )
