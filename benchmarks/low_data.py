"""From how few examples do models come out robust?

    python -m benchmarks.low_data

The rows of `benchmarks.transfer` on 100 examples and more, each baseline tuned anew for each number
of them, on a fifth. Writes the table and a plot of it.
"""

import argparse
import functools
import json
import pathlib

import matplotlib.pyplot as plt
from rich.console import Console

import advmeta
from advmeta.evaluation.transfer import META_OPTIMIZER, Cell, TransferConfig
from advmeta.report.plots import mean_curve
from advmeta.table_command import make_table
from benchmarks.transfer import ROWS

SETTINGS = {"digits": ("mlp-20", 0.1, (100, 200, 500, 1000)),
            "fashion_small": ("mlp-20", 0.05, (100, 200, 500, 1000, 2000))}  # fmt: skip


def cells(dataset: str) -> tuple[Cell, ...]:
    optimizee, epsilon, numbers = SETTINGS[dataset]
    return tuple(
        Cell(f"{n} examples", dataset, optimizee, epsilon, train_examples=n) for n in numbers
    )


def curves(records: list[dict]) -> list[dict]:
    """A record a row and seed, with robust accuracy at each number of examples."""
    found: dict[tuple, dict] = {}
    for r in records:
        who = r["optimizer"], r["inner_gradient"], r["seed"]
        empty = {"name": f"{who[0]}, {who[1]} gradients", "examples": [], "robust_accuracy": []}
        curve = found.setdefault(who, empty)
        curve["examples"].append(int(r["setting"].split()[0]))
        curve["robust_accuracy"].append(r["robust_accuracy"])
    return list(found.values())


def plot(tables: dict[str, list[dict]], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(1, len(tables), figsize=(5 * len(tables), 3.6), squeeze=False)
    for ax, (dataset, records) in zip(axes[0], tables.items(), strict=True):
        found = curves(records)
        for name in dict.fromkeys(curve["name"] for curve in found):
            same = [curve for curve in found if curve["name"] == name]
            xs, means, spreads = mean_curve(same, "examples", "robust_accuracy")
            width = 2.5 if name.startswith(META_OPTIMIZER) else 1.2
            (line,) = ax.plot(xs, means, marker="o", markersize=3, linewidth=width, label=name)
            ax.fill_between(xs, means - spreads, means + spreads, color=line.get_color(), alpha=0.1)
        optimizee, epsilon, numbers = SETTINGS[dataset]
        ax.set_xscale("log")
        ax.set_xticks(numbers, map(str, numbers), minor=False)
        ax.minorticks_off()
        ax.set(title=f"{dataset}, {optimizee}, linf {epsilon}", xlabel="training examples")
        ax.set(ylabel="robust accuracy, AutoAttack", ylim=(0, None))
        ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="mixture")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--datasets", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/low-data"))
    arguments = parser.parse_args()
    optimizer = functools.partial(advmeta.load_meta_optimizer, arguments.weights)
    tables = {}
    for dataset in arguments.datasets:
        config = TransferConfig(
            cells=cells(dataset), rows=ROWS, inner_gradients=("clean", "noisy"),
            seeds=arguments.seeds, attack="autoattack", batch_size=64,
        )  # fmt: skip
        folder = arguments.output / dataset
        folder.mkdir(parents=True, exist_ok=True)
        make_table(config, optimizer, 0, folder, Console())
        tables[dataset] = json.loads((folder / "results.json").read_text())
        (folder / "table.md").write_text(advmeta.report.markdown(tables[dataset]))
    plot(tables, arguments.output / "low_data.png")


if __name__ == "__main__":
    main()
