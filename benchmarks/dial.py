"""What does the epsilon do that a meta-optimizer is told? It is the dial between clean and robust.

    python -m benchmarks.dial --settings "digits, wider" "digits, tanh"

In columns of `benchmarks.transfer`, with its keys: `mixture` with clean gradients and
`mixture-noisy` with noisy ones are told so many times the epsilon that their models are then
attacked with, under PGD on the margin, 40 steps and 3 restarts. Beside their curves stand the
rivals of that table, from the table's records. A column that is there already is not
computed again.
"""

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import advmeta
from advmeta.evaluation.transfer import cell_keys, judge, make_tasks
from advmeta.evaluation.transfer_config import TransferConfig
from advmeta.inner_gradients import RECIPES
from advmeta.report.style import COLORS, RC
from advmeta.tasks import Task, aim_at
from advmeta.types import Array, Key, Params
from advmeta.unroll import train
from benchmarks import timing
from benchmarks.transfer import CIFAR, OURS, PAIRS, mean

TOLD = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)  # times the epsilon of the attack
CURVES = {"clean": ("meta", "d"), "noisy": ("meta", "D")}  # gradients: colour and marker
RIVALS = (  # of the table's rows: optimizer, inner gradient, colour, marker, label
    ("adam, no decay", "clean", "muted", "o", "Adam, rate tuned"),
    ("adam", "clean", "clean", "s", "Adam, L2 tuned"),
    ("adam", "noisy", "noisy", "v", "Adam, L2 tuned, noise"),
    ("adam", "adversarial", "adversarial", "^", "adversarial training"),
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def trained(table: TransferConfig, recipe: str, task: Task, told: Array, keys: Key) -> Params:
    """Models of the weights for a recipe, told so many times the task's epsilon, [seeds, ...]."""
    aim = aim_at(task.threat_model, table.inner_steps)
    aim = aim._replace(epsilon=told * aim.epsilon)
    optimizer = advmeta.load_meta_optimizer(OURS[recipe], aim)

    def run(key: Key) -> Params:
        gradient = RECIPES[recipe].inner_gradient
        return train(
            task, optimizer, key, steps=table.inner_steps, inner_gradient=gradient
        )[0]  # fmt: skip

    return jax.vmap(run)(keys)


def measure(table: TransferConfig, index: int, recipe: str) -> list[dict]:
    """The records of the column of this index."""
    _, train_key, attack_key = cell_keys(jax.random.key(0), index)
    _, task = make_tasks(table, table.cells[index])
    keys, records = jax.random.split(train_key, table.seeds), []
    for told in TOLD:
        params = trained(table, recipe, task, jnp.float32(told), keys)
        accuracy = judge(table, task, params, attack_key)
        records += [
            {
                "setting": table.cells[index].setting, "inner_gradient": recipe, "told": told,
                "seed": seed, "attack": f"pgd-margin-{table.attack_steps}x{table.restarts}",
                "clean_accuracy": float(clean), "robust_accuracy": float(robust),
            }
            for seed, (clean, robust) in enumerate(zip(*accuracy, strict=True))
        ]  # fmt: skip
    return records


def curve(records: list[dict], setting: str, recipe: str) -> tuple[list[float], list[float]]:
    """Clean and robust accuracy, means over the seeds, one for each of `TOLD`."""
    here = [r for r in records if (r["setting"], r["inner_gradient"]) == (setting, recipe)]

    def means(name: str) -> list[float]:
        return [float(np.mean([r[name] for r in here if r["told"] == told])) for told in TOLD]

    return means("clean_accuracy"), means("robust_accuracy")


def plot(records: list[dict], rivals: list[dict], path: pathlib.Path) -> None:
    """Robust against clean accuracy, a panel a column; rivals under PGD, too."""
    settings = list(dict.fromkeys(r["setting"] for r in records))
    with plt.rc_context(RC):
        rows, columns = -(-len(settings) // 3), min(len(settings), 3)
        figure, axes = plt.subplots(
            rows, columns, figsize=(3.3 * columns, 2.9 * rows + 0.5), squeeze=False
        )  # fmt: skip
        for ax in axes.flat[len(settings) :]:
            ax.set_visible(False)
        for ax, setting in zip(axes.flat, settings, strict=False):
            for recipe, (color, marker) in CURVES.items():
                clean, robust = curve(records, setting, recipe)
                ax.plot(
                    clean, robust, f"-{marker}", ms=4, color=COLORS[color][0],
                    mfc=COLORS[color][0] if recipe == "noisy" else "none",
                    label=f"{OURS[recipe]}, {recipe}",
                )  # fmt: skip
                for told, x, y in zip(TOLD, clean, robust, strict=True):
                    if told in (TOLD[0], 1, TOLD[-1]):
                        ax.annotate(
                            f"{told:g}", (x, y), (0, 5), textcoords="offset points", ha="center"
                        )
            here = [r for r in rivals if r["setting"] == setting]
            for optimizer, gradient, color, marker, label in RIVALS if here else ():
                point = [
                    mean(here, optimizer, gradient, name=name)
                    for name in ("clean_accuracy", "pgd_accuracy")
                ]
                ax.plot(*point, marker, ms=6, color=COLORS[color][0], label=label)
            ax.set(title=setting)
            ax.margins(0.1)
            ax.grid()
        for ax in axes[:, 0]:
            ax.set_ylabel("robust accuracy, PGD")
        for ax in axes[-1]:
            ax.set_xlabel("clean accuracy")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=3)
        figure.tight_layout(rect=(0, 0.2 / rows, 1, 1))
        figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [cell.setting for cell in PAIRS if cell.dataset != CIFAR]
    small = [setting for setting in known if "ResNet" not in setting]  # that takes hours
    parser.add_argument("--settings", nargs="+", default=small, choices=known)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--table", type=pathlib.Path, default=timing.RESULTS / "transfer.jsonl")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/dial"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path, records = arguments.output / "records.jsonl", []
    if path.exists():
        records = [json.loads(line) for line in path.open()]
    done = {(r["setting"], r["inner_gradient"]) for r in records}
    table = TransferConfig(cells=PAIRS, rows=(), seeds=arguments.seeds)
    for index, cell in enumerate(PAIRS):
        for recipe in CURVES if cell.setting in arguments.settings else ():
            if (cell.setting, recipe) not in done:
                found = measure(table, index, recipe)
                with path.open("a") as file:
                    file.writelines(json.dumps(record) + "\n" for record in found)
                records += found
    records = [r for r in records if r["setting"] in arguments.settings]
    for setting, recipe in dict.fromkeys((r["setting"], r["inner_gradient"]) for r in records):
        clean, robust = curve(records, setting, recipe)
        cells = [f"{r:.3f} ({c:.3f})" for r, c in zip(robust, clean, strict=True)]
        print(f"| {setting}, {recipe} | {' | '.join(cells)} |")
    rivals = [json.loads(line) for line in arguments.table.open()]
    plot(records, rivals, arguments.output / "dial.png")


if __name__ == "__main__":
    main()
