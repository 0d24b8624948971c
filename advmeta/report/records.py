"""Records of a run, one a row and seed -> the cells of the transfer table."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SAME = "same architecture"
SETTINGS = (SAME, "wider", "deeper", "other activation", "CNN", "other data set")
REQUIRED = ("optimizer", "inner_gradient", "clean_accuracy", "robust_accuracy")


class Row(NamedTuple):
    """Who trained the models, and on what."""

    optimizer: str
    inner_gradient: str

    @property
    def meta(self) -> bool:
        return self.optimizer.startswith("meta")

    @property
    def label(self) -> str:
        return f"{self.optimizer} ({self.inner_gradient})"


class Column(NamedTuple):
    """What was trained, and how it was attacked: records that differ in any of it do not mix."""

    setting: str
    dataset: str
    architecture: str
    norm: str
    epsilon: float
    attack: str
    inner_steps: int


class Summary(NamedTuple):
    """Of one number over the seeds."""

    mean: float  # NaN if any of the numbers is
    spread: float  # sample standard deviation; NaN for one number
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]

    def __str__(self) -> str:
        if self.count < 2 or not math.isfinite(self.mean):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.spread:.3f}"


class Cell(NamedTuple):
    robust: Summary
    clean: Summary
    pgd: Summary | None  # where robust accuracy is another attack's

    def __str__(self) -> str:
        return f"{self.robust} ({self.clean.mean:.3f})"

    @property
    def beside(self) -> tuple[str, ...]:
        """PGD's number, and by how much it is too high; nothing where there is no other."""
        if self.pgd is None:
            return ()
        gap = round(self.pgd.mean - self.robust.mean, 3) + 0.0  # no minus before a zero
        return f"PGD {self.pgd.mean:.3f}", f"gap {gap:.3f}"


class Cost(NamedTuple):
    """Means over the runs of a row."""

    gradient_evaluations: float
    adversarial_examples: float
    seconds: float

    def strings(self) -> tuple[str, str, str]:
        return (
            f"{self.gradient_evaluations:,.0f}",
            f"{self.adversarial_examples:,.0f}",
            f"{self.seconds:.2f}" if self.seconds < 10 else f"{self.seconds:,.0f}",
        )


class Transfer(NamedTuple):
    """The transfer table."""

    rows: tuple[Row, ...]  # the meta-optimizer's last
    columns: tuple[Column, ...]
    cells: dict[tuple[Row, Column], Cell]  # of those that were run
    costs: dict[Row, Cost]
    caption: str

    def header(self, column: Column) -> tuple[str, ...]:
        """The lines above a column: the setting, and what it stands for."""
        threat_model = f"{column.norm} {column.epsilon:.3g}" if column.norm else ""
        lines = [column.setting, column.dataset, column.architecture, threat_model]
        lines += [column.attack] if len({c.attack for c in self.columns}) > 1 else []
        several = len({c.inner_steps for c in self.columns}) > 1
        lines += [f"{column.inner_steps} steps"] if several else []
        return tuple(line for line in lines if line)


def flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested dicts and lists of them -> pairs such as ("tasks[0].epsilon", "0.1")."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, (Mapping, list)) for inner in value):
        for place, inner in enumerate(value):
            yield from flat(inner, f"{name}[{place}]")
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


def number(value: Any) -> float:
    """A float; NaN for what is missing."""
    return math.nan if value is None else float(value)


def summarise(values: Iterable[object]) -> Summary:
    """Mean and sample standard deviation, as they are: no NaN is left out."""
    numbers = np.array([number(value) for value in values])
    with np.errstate(invalid="ignore"):  # infinite numbers
        spread = numbers.std(ddof=1) if len(numbers) > 1 else math.nan
        return Summary(float(numbers.mean()), float(spread), len(numbers))


def row_of(record: Mapping) -> Row:
    return Row(str(record["optimizer"]), str(record["inner_gradient"]))


def column_of(record: Mapping) -> Column:
    return Column(
        setting=str(record.get("setting", "")),
        dataset=str(record.get("dataset", "")),
        architecture=str(record.get("architecture", "")),
        norm=str(record.get("norm", "")),
        epsilon=number(record["epsilon"]) if record.get("epsilon") is not None else 0.0,
        attack=str(record.get("attack", "")),
        inner_steps=int(record.get("inner_steps") or 0),
    )


def in_order(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Clean without weight decay, clean, noisy, adversarial, others; the meta-optimizer last."""

    def place(row: Row) -> tuple[bool, int]:
        if row.inner_gradient == "clean":
            return row.meta, 0 if "no decay" in row.optimizer else 1
        return row.meta, {"noisy": 2, "adversarial": 3}.get(row.inner_gradient, 4)

    return tuple(sorted(dict.fromkeys(rows), key=place))  # stable: else as they came


def transfer(records: Sequence[Mapping]) -> Transfer:
    """Groups records into rows, columns and cells; see `advmeta.report.table`."""
    _check(records)
    groups: dict[tuple[Row, Column], list[Mapping]] = {}
    for record in records:
        groups.setdefault((row_of(record), column_of(record)), []).append(record)
    rows = in_order(row for row, _ in groups)
    known = {setting: place for place, setting in enumerate(SETTINGS)}
    columns = dict.fromkeys(column for _, column in groups)
    columns = sorted(columns, key=lambda column: known.get(column.setting, len(known)))
    cells = {key: _cell(group) for key, group in groups.items()}
    costs = {row: _cost([r for r in records if row_of(r) == row]) for row in rows}
    return Transfer(rows, tuple(columns), cells, costs, _caption(records, cells))


def _cell(group: Sequence[Mapping]) -> Cell:
    robust, clean = (
        summarise(r[name] for r in group) for name in ("robust_accuracy", "clean_accuracy")
    )
    has_pgd = any("pgd_accuracy" in r for r in group)
    return Cell(robust, clean, summarise(r.get("pgd_accuracy") for r in group) if has_pgd else None)


def _check(records: Sequence[Mapping]) -> None:
    if not records:
        raise ValueError("there are no records; give those of results.json, one a row and seed")
    for place, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ValueError(f"record {place} is {record!r}; it must be a dict with {REQUIRED}")
        missing = [key for key in REQUIRED if key not in record]
        if missing:
            raise ValueError(
                f"record {place} lacks {missing}; it must hold {list(REQUIRED)}, and it has "
                f"{sorted(record)}"
            )


def _cost(records: Sequence[Mapping]) -> Cost:
    return Cost(*(summarise(r.get(name) for r in records).mean for name in Cost._fields))


def _caption(records: Sequence[Mapping], cells: Mapping[Any, Cell]) -> str:
    counts = sorted({cell.robust.count for cell in cells.values()})
    if counts == [1]:
        first = "Robust accuracy of one seed (clean accuracy)"
    else:
        seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        first = f"Robust accuracy ± standard deviation over {seeds} seeds (clean accuracy)"
    attacks = ", ".join(dict.fromkeys(str(r["attack"]) for r in records if r.get("attack")))
    steps = sorted({int(r["inner_steps"]) for r in records if r.get("inner_steps")})
    weaker = ", ".join(dict.fromkeys(str(r["pgd"]) for r in records if r.get("pgd")))
    parts = [first, f"attack {attacks}" if attacks else "",
             f"PGD {weaker}, gap: PGD minus that attack" if weaker else "",
             f"{' or '.join(map(str, steps))} inner steps" if steps else ""]  # fmt: skip
    sentences = "; ".join(part for part in parts if part)
    return f"{sentences}. Costs: means over the runs of a row. {_tuning(records)}".strip()


def _tuning(records: Sequence[Mapping]) -> str:
    """Who was tuned, going by what the records say was spent on it."""
    tuned = {row_of(r) for r in records if r.get("tuning_gradient_evaluations")}
    rows = in_order(row_of(r) for r in records)
    baselines = [row for row in rows if not row.meta]
    untuned = [row.label for row in baselines if row not in tuned]
    parts = []
    if baselines and len(untuned) < len(baselines):
        but = f" (but not {', '.join(untuned)})" if untuned else ""
        parts.append(f"baselines tuned on a validation split{but}")
    elif baselines:
        parts.append("baselines not tuned")
    if len(baselines) < len(rows):
        touched = any(row.meta for row in tuned)
        parts.append(f"the meta-optimizer is {'tuned as well' if touched else 'not tuned'}")
    sentence = "; ".join(parts)
    return f"{sentence[:1].upper()}{sentence[1:]}."
