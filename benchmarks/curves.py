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
import pathlib

import jax
import matplotlib.pyplot as plt
from rich.console import Console

import advmeta
from advmeta.evaluation.transfer import META_OPTIMIZER, Cell, TransferConfig, transfer_cells
from advmeta.report.plots import mean_curve
from advmeta.run_folder import replace_file
from benchmarks.transfer import ROWS

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
        rows=ROWS, inner_gradients=("clean", "noisy"), seeds=seeds, attack="autoattack",
        inner_steps=int(value) if axis == "steps" else 200,
        batch_size=64 if axis == "examples" else 128,
    )  # fmt: skip


def measure(table: TransferConfig, weights: str, adversarial_weights: str, report) -> list[dict]:
    """Of the table's rows, and of the second weights with FGSM-RS gradients."""
    adversarial = dataclasses.replace(table, rows=(), inner_gradients=("fgsm-rs",))
    found = []
    for part, name in ((table, weights), (adversarial, adversarial_weights)):
        optimizer = functools.partial(advmeta.load_meta_optimizer, name)
        records, _ = next(transfer_cells(part, optimizer, key=jax.random.key(0), report=report))
        found += records
    return found


def curves(records: list[dict]) -> list[dict]:
    """A curve a row and seed, with robust accuracy at each value."""
    found: dict[tuple, dict] = {}
    for r in records:
        who = r["optimizer"], r["inner_gradient"], r["seed"]
        empty = {"name": f"{who[0]}, {who[1]} gradients", "value": [], "robust_accuracy": []}
        curve = found.setdefault(who, empty)
        curve["value"].append(float(r["setting"]))
        curve["robust_accuracy"].append(r["robust_accuracy"])
    return list(found.values())


def plot(axis: str, tables: dict[str, list[dict]], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(1, len(tables), figsize=(5 * len(tables), 3.6), squeeze=False)
    for ax, (dataset, records) in zip(axes[0], tables.items(), strict=True):
        found = curves(records)
        for name in dict.fromkeys(curve["name"] for curve in found):
            same = [curve for curve in found if curve["name"] == name]
            xs, means, spreads = mean_curve(same, "value", "robust_accuracy")
            width = 2.5 if name.startswith(META_OPTIMIZER) else 1.2
            (line,) = ax.plot(xs, means, marker="o", markersize=3, linewidth=width, label=name)
            ax.fill_between(xs, means - spreads, means + spreads, color=line.get_color(), alpha=0.1)
        ax.set_xscale("log")
        ax.set_xticks(VALUES[axis][dataset], [f"{v:g}" for v in VALUES[axis][dataset]])
        ax.minorticks_off()
        fixed = "" if axis == "epsilon" else f", linf {EPSILON[dataset]}"
        ax.set(title=f"{dataset}, {MODEL}{fixed}", xlabel=LABELS[axis], ylim=(0, None))
        ax.set_ylabel("robust accuracy, AutoAttack")
        ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("axis", choices=VALUES)
    parser.add_argument("--weights", default="mixture")
    parser.add_argument(
        "--adversarial-weights", default="mixture-adversarial", help="given FGSM-RS gradients"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--datasets", nargs="+", default=list(EPSILON), choices=EPSILON)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/curves"))
    arguments = parser.parse_args()
    weights = arguments.weights, arguments.adversarial_weights
    folder, tables, console = arguments.output / arguments.axis, {}, Console()
    folder.mkdir(parents=True, exist_ok=True)
    for dataset in arguments.datasets:
        file = folder / f"{dataset}.json"
        records = json.loads(file.read_text()) if file.exists() else []
        done = {record["setting"] for record in records}
        for value in VALUES[arguments.axis][dataset]:
            if f"{value:g}" not in done:
                table = config(arguments.axis, dataset, value, arguments.seeds)
                records += measure(table, *weights, console.print)
                replace_file(file, (json.dumps(records, indent=1) + "\n").encode())
        tables[dataset] = records
        (folder / f"{dataset}.md").write_text(advmeta.report.markdown(records))
    plot(arguments.axis, tables, folder / "curves.png")


if __name__ == "__main__":
    main()
