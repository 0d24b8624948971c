"""Does a meta-optimizer that is not tuned keep up with tuned rivals on pairs it has not met?

    python -m benchmarks.transfer --cifar cifar10_subset.npz

The pairs of data set and architecture below were written down before the meta-training of the
weights that are shipped; no meta-training and no selection touched them, and Fashion-MNIST is in
neither. (What earlier weights had here on CIFAR-10 had a say in `mixture-adversarial`.)
There are weights for clean examples, for noisy ones, and for adversarial ones, which are
remembered from an example's last gradient or made with one more (FGSM-RS); beside the first two
stands the rule that they modulate, without them, whose constants were chosen on draws of the
training parts of digits and CIFAR-10. An interrupted table goes on after its last whole column.
The npz file holds 5,000 training and 1,000 test images of CIFAR-10, as `advmeta.data.load` reads
them; without it that pair is left out.

    python -m benchmarks.transfer --cifar cifar10_subset.npz --output runs/late \
        --settings "Fashion, deeper tanh" "CIFAR-10, MLP" "Fashion, l2"

is the table of three pairs that came later than the weights.

    python -m benchmarks.transfer --render runs/transfer/records.jsonl

writes the tables of records that were measured before.
"""

import argparse
import dataclasses
import functools
import json
import pathlib

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.console import Console

import advmeta
from advmeta import environment
from advmeta.evaluation.transfer import META_OPTIMIZER, MakeMetaOptimizer
from advmeta.evaluation.transfer_config import Cell, TransferConfig
from advmeta.meta_optimizer.pretrained import tell_apart, weights_path
from advmeta.report.style import COLORS, RC
from advmeta.table_command import make_table

CIFAR = "cifar"
PAIRS = (
    Cell("digits, MLP", "digits", "mlp-20", 0.1),
    Cell("Fashion, MLP", "fashion_small", "mlp-20", 0.05),
    Cell("digits, CNN", "digits", "cnn-4-8", 0.1),
    Cell("digits, deeper", "digits", "mlp-20-20", 0.1),
    Cell("digits, tanh", "digits", "mlp-20-tanh", 0.1),
    Cell("digits, wider", "digits", "mlp-40", 0.1),
    Cell("digits, l2", "digits", "mlp-20", 0.5, "l2"),
    Cell("Fashion, CNN", "fashion_small", "cnn-4-8", 0.05),
    Cell("Fashion, ResNet", "fashion_small", "resnet-4-8", 0.05),
    Cell("CIFAR-10, CNN", CIFAR, "cnn-8-16", 0.01),
)
# What was seen on the pairs above has had a say in later work. These were written down when all
# weights, constants and grids were there, and measured once; nothing is chosen by them.
LATE = (
    Cell("Fashion, deeper tanh", "fashion_small", "mlp-30-30-tanh", 0.05),
    Cell("CIFAR-10, MLP", CIFAR, "mlp-40", 0.01),
    Cell("Fashion, l2", "fashion_small", "mlp-40", 0.75, "l2"),
)
ROWS = ("adam-no-decay", "adam", "adam-noisy", "remembered", "fgsm-rs", "vat", "adversarial")
RIVALS = {
    ("adam, no decay", "clean"),
    ("adam", "clean"),
    ("adam", "noisy"),
    ("adam", "adversarial"),
}
NOMINAL = "nominal rule"
OURS = {
    "clean": "mixture",
    "noisy": "mixture-noisy",
    "remembered": "mixture-adversarial",
    "fgsm-rs": "mixture-adversarial",
}
WITH_NOMINAL = ("clean", "noisy")
# Rows of the README's table: a name, gradients a step, the optimizer and its inner gradients, of
# which the best of each column is shown; and colour and marker, where the figure shows it.
SUMMARY = (
    ("Adam, learning rate tuned", 1, "adam, no decay", ("clean",), ("muted", "o")),
    ("best with decay or noise tuned", 1, "adam", ("clean", "noisy"), ("clean", "s")),
    ("the rule without its weights, clean", 1, NOMINAL, ("clean",), None),
    ("the same, noisy", 1, NOMINAL, ("noisy",), None),
    ("**`mixture`, clean**", 1, META_OPTIMIZER, ("clean",), ("meta", "d")),
    ("**`mixture-noisy`, noisy**", 1, META_OPTIMIZER, ("noisy",), ("meta", "D")),
    ("remembered perturbations, tuned", 1, "adam", ("remembered",), None),
    ("**`mixture-adversarial`, remembered**", 1, META_OPTIMIZER, ("remembered",), ("noisy", "P")),
    ("FGSM-RS training, tuned", 2, "adam", ("fgsm-rs",), None),
    ("**`mixture-adversarial`, FGSM-RS**", 2, META_OPTIMIZER, ("fgsm-rs",), ("noisy", "D")),
    ("VAT, tuned", 3, "adam", ("vat",), ("muted", "^")),
    ("adversarial training, tuned", 8, "adam", ("adversarial",), ("adversarial", "^")),
)


def values(records: list[dict], optimizer: str, inner_gradient: str, name: str) -> list[float]:
    """Of a row, one a seed."""
    row = (optimizer, inner_gradient)
    return [r[name] for r in records if (r["optimizer"], r["inner_gradient"]) == row]


def best(
    records: list[dict], setting: str, optimizer: str, inner_gradients
) -> tuple[list[float], list[float]] | None:
    """Robust and clean accuracy, one a seed, of the most robust of these rows in a column."""
    here = [r for r in records if r["setting"] == setting]
    found = [
        (values(here, optimizer, name, "robust_accuracy"),
         values(here, optimizer, name, "clean_accuracy"))
        for name in inner_gradients
    ]  # fmt: skip
    found = [row for row in found if row[0]]
    return max(found, key=lambda row: np.mean(row[0]), default=None)


def summary(records: list[dict]) -> str:
    """The README's table: robust and clean accuracy, means over the seeds."""
    settings = list(dict.fromkeys(r["setting"] for r in records))
    lines = [["", "gradients<br>a step", *(s.replace(", ", ",<br>") for s in settings)]]
    lines.append(["---"] + [":-:"] * (len(settings) + 1))
    for label, gradients, *row, _ in SUMMARY:
        cells = []
        for setting in settings:
            row_here = best(records, setting, *row)
            if row_here is None:
                cells.append("-")
                continue
            robust, clean = map(np.mean, row_here)
            bold = "**" if label.startswith("**") else ""
            cells.append(f"{bold}{robust:.3f}{bold}<br>({clean:.3f})")
        lines.append([label, str(gradients), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plot(records: list[dict], path: pathlib.Path) -> None:
    """The README's table as a figure."""
    settings = list(dict.fromkeys(r["setting"] for r in records))
    shown = [row for row in SUMMARY if row[-1]]
    with plt.rc_context(RC):
        figure, ax = plt.subplots(figsize=(8.6, 3.6))
        for place, (label, _, *row, (color, marker)) in enumerate(shown):
            plain = label.replace("*", "").replace("`", "")
            found = {at: best(records, setting, *row) for at, setting in enumerate(settings)}
            found = {at: row_here[0] for at, row_here in found.items() if row_here}
            ax.errorbar(
                [at + 0.1 * (place - (len(shown) - 1) / 2) for at in found],
                [np.mean(robust) for robust in found.values()],
                [np.std(robust, ddof=1) for robust in found.values()],
                fmt=marker, ms=5, color=COLORS[color][0], elinewidth=1, label=plain,
            )  # fmt: skip
        ax.set_xticks(range(len(settings)), [s.replace(", ", ",\n") for s in settings])
        ax.set(ylabel="robust accuracy, AutoAttack", ylim=(0, None))
        ax.grid(axis="y")
        figure.legend(loc="lower center", ncols=3)
        figure.tight_layout(rect=(0, 0.16, 1, 1))
        figure.savefig(path, dpi=130)
        plt.close(figure)


def mean(records: list[dict], optimizer: str, *inner_gradients: str, name: str) -> float:
    """Of a row in a column; of several rows, the highest."""
    found = [np.mean(values(records, optimizer, gradient, name)) for gradient in inner_gradients]
    return float(max(found))


def verdict(records: list[dict]) -> list[dict]:
    """For each pair with all rivals and each of our rows: what it beats, and by how much."""
    lines = []
    for setting in dict.fromkeys(r["setting"] for r in records):
        here = [r for r in records if r["setting"] == setting]
        rows = {(r["optimizer"], r["inner_gradient"]) for r in here}
        if not rows >= RIVALS:
            continue
        robust = functools.partial(mean, here, name="robust_accuracy")
        clean = functools.partial(mean, here, name="clean_accuracy")
        plain = robust("adam, no decay", "clean")
        strongest = robust("adam", "clean", "noisy")
        adversarial = robust("adam", "adversarial")
        gained = adversarial - plain  # a ResNet's may be none: there is no way to go a share of
        ours = dict.fromkeys(
            r["inner_gradient"] for r in here if r["optimizer"] == META_OPTIMIZER
        )  # in order
        for inner_gradient in ours:
            reached = robust(META_OPTIMIZER, inner_gradient)
            lines.append(
                {
                    "setting": setting,
                    "inner_gradient": inner_gradient,
                    "robust_accuracy": reached,
                    "over_decay_and_noise": reached - strongest,
                    "share_of_the_way": (reached - plain) / gained if gained > 0 else None,
                    "clean_over_adversarial": clean(META_OPTIMIZER, inner_gradient)
                    - clean("adam", "adversarial"),
                }
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", help="the npz file of CIFAR-10")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--attack", default="autoattack", choices=("autoattack", "pgd"))
    for gradient, name in OURS.items():
        parser.add_argument(f"--{gradient}", default=name, help=f"weights for {gradient} gradients")
    parser.add_argument("--rows", nargs="*", default=ROWS)
    parser.add_argument(
        "--settings", nargs="+", help="only these of `PAIRS` and `LATE`, with keys of their own"
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/transfer"))
    parser.add_argument("--render", type=pathlib.Path, help="records, one a line; runs nothing")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.render:
        write([json.loads(line) for line in arguments.render.open()], arguments.output)
    else:
        measure(arguments)


def write(records: list[dict], folder: pathlib.Path) -> None:
    """The records, both tables, the figure, and the verdict."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "records.jsonl").write_text(lines)
    (folder / "table.md").write_text(advmeta.report.markdown(records))
    (folder / "summary.md").write_text(summary(records))
    plot(records, folder / "summary.png")
    found = verdict(records)
    (folder / "verdict.json").write_text(json.dumps(found, indent=1) + "\n")
    for line in found:
        print(json.dumps(line))


def measure(arguments: argparse.Namespace) -> None:
    chosen = arguments.settings or [cell.setting for cell in PAIRS]
    cells = tuple(
        cell if cell.dataset != CIFAR else dataclasses.replace(cell, dataset=arguments.cifar)
        for cell in (*PAIRS, *LATE)
        if cell.setting in chosen and (cell.dataset != CIFAR or arguments.cifar)
    )
    folder, records = arguments.output, []
    weights = {gradient: getattr(arguments, gradient.replace("-", "_")) for gradient in OURS}
    for gradient, name in weights.items():
        config = TransferConfig(
            cells=cells, seeds=arguments.seeds, attack=arguments.attack,
            rows=tuple(arguments.rows) if gradient == "clean" else (), inner_gradients=(gradient,),
        )  # fmt: skip
        optimizer = functools.partial(advmeta.load_meta_optimizer, name)
        records += _table(
            config, optimizer, folder / gradient, tell_apart(name), gradient == "clean"
        )
        if gradient not in WITH_NOMINAL:
            continue
        optimizer = functools.partial(untrained, name)
        nominal = dataclasses.replace(config, rows=())
        nominal = _table(nominal, optimizer, folder / f"{gradient}-nominal", tell_apart(name))
        records += [record | {"optimizer": NOMINAL} for record in nominal]
    digests = {gradient: tell_apart(name) for gradient, name in weights.items()}
    card = {"weights": weights, "weights_digests": digests, **environment.describe()}
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    write(records, folder)


def _table(
    config: TransferConfig,
    optimizer: MakeMetaOptimizer,
    folder: pathlib.Path,
    weights: str,
    check: bool = False,
) -> list:
    folder.mkdir(parents=True, exist_ok=True)
    make_table(config, optimizer, 0, folder, Console(), weights=weights, check=check)
    return json.loads((folder / "results.json").read_text())


def untrained(name: str, aim: advmeta.Aim) -> optax.GradientTransformation:
    """The nominal rule that these weights modulate."""
    _, config, _ = advmeta.load_weights(weights_path(name))
    phi = advmeta.init_meta_params(config, jax.random.key(0))
    return advmeta.scale_by_meta_optimizer(phi, config, aim)


if __name__ == "__main__":
    main()
