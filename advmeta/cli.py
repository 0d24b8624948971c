"""The command line: argv -> frozen configs -> calls. Only commands print."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import operator
import os
import pathlib
import shlex
import sys
from typing import Annotated

import jax
import optax
import tyro
from jax.tree_util import Partial
from rich.console import Console

from advmeta import config_files, processes, report
from advmeta.attack_command import Attack, attack
from advmeta.evaluation.baselines import ROWS
from advmeta.evaluation.sanity import Check, sanity_checks
from advmeta.evaluation.transfer import Entry, TransferConfig, transfer_table
from advmeta.meta_optimizer.pretrained import load_meta_optimizer
from advmeta.meta_optimizer.transform import scale_by_meta_optimizer
from advmeta.patch_command import Patch, patch_files
from advmeta.progress import TableProgress
from advmeta.run_folder import Shared, open_folder, replace_file
from advmeta.tasks import Task
from advmeta.training_command import MetaTrain, Training, take_part, train_and_save
from advmeta.types import PyTree

_ACCELERATOR_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin", "libtpu")


@dataclasses.dataclass(frozen=True)
class Run(Training):
    """Meta-train an optimizer, hold it against tuned baselines, and write a report.

    Example: advmeta run --output runs/first --training.outer-steps 300
    """

    table: TransferConfig = TransferConfig()


@dataclasses.dataclass(frozen=True)
class Evaluate(Shared):
    """Hold a meta-optimizer against tuned baselines, robust training recipes included.

    Writes a report. The default table, 252 models, took 39 minutes on 2 CPU cores. Where time is
    short, --table.attack pgd leaves out AutoAttack, and --table.rows adam adversarial leaves out
    the other rows.

    Example: advmeta evaluate --weights runs/mine/meta_optimizer.safetensors --table.seeds 5

    Args:
      weights: a name of advmeta.list_pretrained(), or a .safetensors file.
    """

    weights: str = "digits-linf"
    table: TransferConfig = TransferConfig(rows=tuple(ROWS), attack="autoattack")


COMMANDS = {
    "run": Run,
    "meta-train": MetaTrain,
    "evaluate": Evaluate,
    "patch": Patch,
    "attack": Attack,
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``advmeta``.

    It exits with 2 where the input cannot be, with 130 or 143 where SIGINT or SIGTERM stopped a
    meta-training, and with 1 after any other error.
    """
    _compile_quickly_on_a_cpu()
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"advmeta {importlib.metadata.version('advmeta')}")
        return
    console = Console()
    try:
        command = parse(argv)
        folder = _DO[type(command)](command, shlex.join(["advmeta", *argv]), console)
    except ValueError as error:
        _complain(error)
        sys.exit(2)
    except (FloatingPointError, ConnectionError) as error:
        _complain(error)
        sys.exit(1)
    if folder is not None:
        console.print(f"written to {folder}", markup=False)


def _complain(error: Exception) -> None:
    Console(stderr=True).print(f"advmeta: {error}", style="red", markup=False)


def _compile_quickly_on_a_cpu() -> None:
    """Most of a short run on a CPU is compiling: this level takes down to a quarter of the time.

    What is compiled runs as fast. XLA reads its flags when JAX makes its first array.
    """
    if not any(map(importlib.util.find_spec, _ACCELERATOR_PLUGINS)):
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")


def parse(argv: list[str]) -> Run | MetaTrain | Evaluate | Patch | Attack:
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
    with open_folder("run", command) as (folder, _):
        meta_params = train_and_save(command, line, folder, console)
        optimizer = scale_by_meta_optimizer(meta_params, command.training.meta_optimizer)
        _make_table(command, optimizer, folder, console)
    return folder


def _meta_train(command: MetaTrain, line: str, console: Console) -> pathlib.Path | None:
    with processes.joined(command):
        command = dataclasses.replace(
            command, coordinator=None, num_processes=None, process_id=None
        )
        if jax.process_index() > 0:
            return take_part(command)
        with open_folder("meta-train", command) as (folder, _):
            train_and_save(command, line, folder, console)
            report.write(folder)
    return folder


def _evaluate(command: Evaluate, line: str, console: Console) -> pathlib.Path:
    optimizer = load_meta_optimizer(command.weights)  # before a folder is made for nothing
    with open_folder("evaluate", command) as (folder, _):
        _make_table(command, optimizer, folder, console)
    return folder


_DO = {
    Run: _run,
    MetaTrain: _meta_train,
    Evaluate: _evaluate,
    Patch: patch_files,
    Attack: attack,
}


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
    replace_file(folder / "results.json", (json.dumps(records, indent=1) + "\n").encode())
    replace_file(folder / "curves.json", (json.dumps(curves) + "\n").encode())
    console.print(report.table(records))
    if isinstance(command, Evaluate):
        with console.status("sanity checks"):
            checks = [check._asdict() for check in _check(command.table, *models[0], key)]
        replace_file(folder / "sanity.json", (json.dumps(checks, indent=1) + "\n").encode())
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
