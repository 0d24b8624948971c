"""How does robust accuracy go with the training examples, the inner steps, or epsilon?

    python -m benchmarks.curves examples
    python -m benchmarks.curves steps
    python -m benchmarks.curves epsilon

The rows of `benchmarks.transfer` on one model, each baseline tuned anew at each value. Writes the
records, the table and a plot. Values that are there already are not computed again.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib

import jax
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

import advmeta
from advmeta.evaluation.transfer import transfer_cells
from advmeta.evaluation.transfer_config import Cell, TransferConfig
from advmeta.report.records import row_of
from advmeta.report.style import RC, looks
from advmeta.run_folder import replace_file
from benchmarks.transfer import OURS, ROWS

MODEL = "mlp-20"
EPSILON = {"digits": 0.1, "fashion_small": 0.05}
VALUES = {
    "examples": {"digits": (100, 200, 500, 1000), "fashion_small": (100, 200, 500, 1000, 2000)},
    # mixture was trained on 100 to 300.
    "steps": dict.fromkeys(EPSILON, (25, 50, 100, 200, 400, 800, 1200)),
    "epsilon": {"digits": (0.025, 0.05, 0.1, 0.15), "fashion_small": (0.0125, 0.025, 0.05, 0.1)},
}
LABELS = {"examples": "training examples", "steps": "inner steps", "epsilon": "epsilon"}


def config(axis: str, dataset: str, value: float, seeds: int) -> TransferConfig:
    """A table of one column."""
    epsilon = value if axis == "epsilon" else EPSILON[dataset]
    examples = int(value) if axis == "examples" else None
    return TransferConfig(
        cells=(Cell(f"{value:g}", dataset, MODEL, epsilon, train_examples=examples),),
        rows=ROWS, seeds=seeds, attack="autoattack",
        inner_steps=int(value) if axis == "steps" else 200,
        batch_size=64 if axis == "examples" else 128,
    )  # fmt: skip


def measure(table: TransferConfig, report) -> list[dict]:
    """Of the table's rows, and of the weights that are shipped with the gradients they are for."""
    found = []
    for gradient, name in OURS.items():
        rows = table.rows if gradient == "clean" else ()
        part = dataclasses.replace(table, rows=rows, inner_gradients=(gradient,))
        optimizer = functools.partial(advmeta.load_meta_optimizer, name)
        records, _ = next(transfer_cells(part, optimizer, key=jax.random.key(0), report=report))
        found += records
    return found


def curve(records: list[dict], value: str) -> tuple[list[float], list[float], list[float]]:
    """The values, and mean and spread over the seeds at each of them, of records of one row."""
    found = {v: [r[value] for r in records if r["setting"] == v] for v in settings(records)}
    spreads = [float(np.std(ys, ddof=1)) if len(ys) > 1 else 0.0 for ys in found.values()]
    return [float(v) for v in found], [float(np.mean(ys)) for ys in found.values()], spreads


def settings(records: list[dict]) -> list[str]:
    return sorted({r["setting"] for r in records}, key=float)


def plot(axis: str, tables: dict[str, list[dict]], path: pathlib.Path) -> None:
    with plt.rc_context(RC):
        figure, axes = plt.subplots(1, len(tables), figsize=(5.6 * len(tables), 4.4), squeeze=False)
        for ax, (dataset, records) in zip(axes[0], tables.items(), strict=True):
            for row, look in looks(map(row_of, records)).items():
                xs, means, spreads = curve(
                    [r for r in records if row_of(r) == row], "robust_accuracy"
                )  # fmt: skip
                ax.errorbar(
                    xs, means, spreads, **look.line, marker=look.marker, ms=4, elinewidth=0.8,
                    label=row.label,
                )  # fmt: skip
            ax.set_xscale("log")
            ax.set_xticks([float(v) for v in settings(records)], settings(records))
            ax.minorticks_off()
            fixed = "" if axis == "epsilon" else f", linf {EPSILON[dataset]}"
            ax.set(title=f"{dataset}, {MODEL}{fixed}", xlabel=LABELS[axis], ylim=(0, None))
            ax.set_ylabel("robust accuracy, AutoAttack")
            ax.grid(axis="y")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        columns = 2 * len(tables)
        figure.legend(handles, labels, loc="lower center", ncols=columns)
        figure.tight_layout(rect=(0, 0.043 * math.ceil(len(labels) / columns), 1, 1))
        figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("axis", choices=VALUES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--values", nargs="+", type=float, help="instead of all of `VALUES`")
    parser.add_argument("--rows", nargs="*", default=ROWS, help="of the rivals")
    parser.add_argument("--datasets", nargs="+", default=list(EPSILON), choices=EPSILON)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/curves"))
    arguments = parser.parse_args()
    folder, tables, console = arguments.output / arguments.axis, {}, Console()
    folder.mkdir(parents=True, exist_ok=True)
    for dataset in arguments.datasets:
        file = folder / f"{dataset}.jsonl"
        records = [json.loads(line) for line in file.open()] if file.exists() else []
        done = {record["setting"] for record in records}
        for value in arguments.values or VALUES[arguments.axis][dataset]:
            if f"{value:g}" not in done:
                table = config(arguments.axis, dataset, value, arguments.seeds)
                table = dataclasses.replace(table, rows=tuple(arguments.rows))
                records += measure(table, console.print)
                lines = "".join(json.dumps(record) + "\n" for record in records)
                replace_file(file, lines.encode())
        tables[dataset] = records
        (folder / f"{dataset}.md").write_text(advmeta.report.markdown(records))
    plot(arguments.axis, tables, folder / "curves.png")


if __name__ == "__main__":
    main()
