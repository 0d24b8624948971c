"""The command line: argv -> frozen configs -> calls. Only commands print."""

import dataclasses
import functools
import importlib.util
import json
import operator
import os
import pathlib
import shlex
import sys
import time
from typing import Annotated

import jax
import optax
import tyro
from jax.tree_util import Partial
from rich.console import Console

from advmeta import config_files, environment, report
from advmeta.attack_command import Attack, attack
from advmeta.evaluation.baselines import ROWS
from advmeta.evaluation.sanity import Check, sanity_checks
from advmeta.evaluation.transfer import Entry, TransferConfig, transfer_table
from advmeta.meta_optimizer.pretrained import load_meta_optimizer
from advmeta.meta_optimizer.transform import scale_by_meta_optimizer
from advmeta.meta_optimizer.weights import save_weights
from advmeta.meta_training import MetaTrainingConfig, meta_train
from advmeta.progress import MetaTrainingProgress, TableProgress
from advmeta.run_folder import Shared, open_folder
from advmeta.tasks import Task
from advmeta.types import MetaParams, PyTree

_WEIGHTS = "meta_optimizer.safetensors"
_ACCELERATOR_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin", "libtpu")


@dataclasses.dataclass(frozen=True)
class Run(Shared):
    """Meta-train an optimizer, hold it against tuned baselines, and write a report.

    Example: advmeta run --output runs/first --training.outer-steps 300
    """

    training: MetaTrainingConfig = MetaTrainingConfig()
    table: TransferConfig = TransferConfig()


@dataclasses.dataclass(frozen=True)
class MetaTrain(Shared):
    """Meta-train an optimizer and write its weights.

    Example: advmeta meta-train --output runs/mine --training.learning-rate 2e-3
    """

    training: MetaTrainingConfig = MetaTrainingConfig()


@dataclasses.dataclass(frozen=True)
class Evaluate(Shared):
    """Hold a meta-optimizer against tuned baselines, robust training recipes included.

    Writes a report. On 2 CPU cores AutoAttack takes about 5 seconds a model on digits, 40 on
    fashion_small, and half a minute of compiling a column: an hour for the 252 models of the
    default table, beside training and tuning. Where time is short, --table.attack pgd leaves it
    out, and --table.rows adam adversarial leaves out the other rows.

    Example: advmeta evaluate --weights runs/mine/meta_optimizer.safetensors --table.seeds 5

    Args:
      weights: a name of advmeta.list_pretrained(), or a .safetensors file.
    """

    weights: str = "digits-linf"
    table: TransferConfig = TransferConfig(rows=tuple(ROWS), attack="autoattack")


COMMANDS = {"run": Run, "meta-train": MetaTrain, "evaluate": Evaluate, "attack": Attack}


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``advmeta``; exits with 2 where the input cannot be."""
    _compile_quickly_on_a_cpu()
    argv = sys.argv[1:] if argv is None else argv
    console = Console()
    try:
        command = parse(argv)
        folder = _DO[type(command)](command, shlex.join(["advmeta", *argv]), console)
    except ValueError as error:
        Console(stderr=True).print(f"advmeta: {error}", style="red", markup=False)
        sys.exit(2)
    console.print(f"written to {folder}", markup=False)


def _compile_quickly_on_a_cpu() -> None:
    """Most of a short run on a CPU is compiling: this level takes down to a quarter of the time.

    What is compiled runs as fast. XLA reads its flags when JAX makes its first array.
    """
    if not any(map(importlib.util.find_spec, _ACCELERATOR_PLUGINS)):
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")


def parse(argv: list[str]) -> Run | MetaTrain | Evaluate | Attack:
    """The command with its resolved config."""
    kinds = [
        Annotated[kind, tyro.conf.subcommand(name, default=_default(kind, name, argv))]
        for name, kind in COMMANDS.items()
    ]
    union = functools.reduce(operator.or_, kinds)
    description = "Learned optimizers that train robust models on clean data."
    return tyro.cli(union, args=argv, prog="advmeta", description=description)


def _default(kind: type, name: str, argv: list[str]):
    """The defaults of a command: the class's, or those of the file that --config names."""
    if argv[:1] != [name]:
        return kind()
    for i, word in enumerate(argv):
        option, _, value = word.partition("=")
        if option == "--config":
            path = value or (argv[i + 1] if i + 1 < len(argv) else "")
            # The folder is where that run wrote; this one needs its own.
            return dataclasses.replace(config_files.from_json(kind, path), output=None)
    return kind()


def _run(command: Run, line: str, console: Console) -> pathlib.Path:
    folder = open_folder("run", command)
    meta_params = _train_and_save(command, line, folder, console)
    optimizer = scale_by_meta_optimizer(meta_params, command.training.meta_optimizer)
    _make_table(command, optimizer, folder, console)
    return folder


def _meta_train(command: MetaTrain, line: str, console: Console) -> pathlib.Path:
    folder = open_folder("meta-train", command)
    _train_and_save(command, line, folder, console)
    report.write(folder)
    return folder


def _evaluate(command: Evaluate, line: str, console: Console) -> pathlib.Path:
    optimizer = load_meta_optimizer(command.weights)  # before a folder is made for nothing
    folder = open_folder("evaluate", command)
    _make_table(command, optimizer, folder, console)
    return folder


_DO = {Run: _run, MetaTrain: _meta_train, Evaluate: _evaluate, Attack: attack}


def _train_and_save(
    command: Run | MetaTrain, line: str, folder: pathlib.Path, console: Console
) -> MetaParams:
    """Meta-trains, logging each record, and writes the weights with their card.

    ``line`` is what was typed.
    """
    config, start = command.training, time.perf_counter()
    made_with = environment.describe()
    with (folder / "metrics.jsonl").open("w") as log, MetaTrainingProgress(config, console) as bar:

        def on_record(record: dict) -> None:
            record = {**record, "seconds": round(time.perf_counter() - start, 3)}
            log.write(json.dumps(record) + "\n")
            log.flush()
            bar.update(record)

        key = jax.random.key(command.seed)
        meta_params, history = meta_train(config, key=key, report=on_record)
    best = max((r for r in history if "robust_accuracy" in r), key=lambda r: r["robust_accuracy"])
    card = {
        "name": folder.name,
        "command": line,
        "seed": command.seed,
        "seconds": round(time.perf_counter() - start, 1),
        **made_with,
        "training": json.loads(config_files.to_json(config)),
        "selected_at": best,
    }
    save_weights(folder / _WEIGHTS, meta_params, config.meta_optimizer, **card)
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return meta_params


def _make_table(
    command: Run | Evaluate,
    optimizer: optax.GradientTransformation,
    folder: pathlib.Path,
    console: Console,
) -> None:
    """Makes, prints and writes the transfer table and the page; `evaluate` also checks it."""
    key, models = jax.random.key(command.seed), []

    def keep(entry: Entry, task: Task, params: PyTree) -> None:
        if entry.optimizer == "meta-optimizer":
            models.append((task, params))

    with TableProgress(command.table, console) as bar:
        records, curves = transfer_table(
            command.table, optimizer, key=key, report=bar.update, keep=keep
        )
    (folder / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    (folder / "curves.json").write_text(json.dumps(curves) + "\n")
    console.print(report.table(records))
    if isinstance(command, Evaluate):
        with console.status("sanity checks"):
            checks = [check._asdict() for check in _check(command.table, *models[0], key)]
        (folder / "sanity.json").write_text(json.dumps(checks, indent=1) + "\n")
        console.print(report.checks(checks))
    report.write(folder)


def _check(config: TransferConfig, task: Task, params: PyTree, key: jax.Array) -> list[Check]:
    """Sanity checks of the model of seed 0; that of seed 1, if there is one, is the surrogate."""
    models = [
        Partial(task.optimizee.apply, jax.tree.map(lambda leaf, seed=seed: leaf[seed], params))
        for seed in range(min(config.seeds, 2))
    ]
    return sanity_checks(
        models[0], *task.held_out, threat_model=task.threat_model, key=key,
        attack_steps=config.attack_steps, restarts=config.restarts,
        surrogate=models[1] if len(models) > 1 else None,
    )  # fmt: skip
