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
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from advmeta import config_files, environment, processes, report
from advmeta.attack_command import Attack, attack
from advmeta.evaluation.baselines import ROWS
from advmeta.evaluation.transfer_config import TransferConfig
from advmeta.imports import is_import_name
from advmeta.meta_optimizer.pretrained import (
    load_card,
    load_meta_optimizer,
    tell_apart,
    untested_on,
)
from advmeta.meta_optimizer.transform import scale_by_meta_optimizer
from advmeta.patch_command import Patch, patch_files
from advmeta.run_folder import Resumable, new_folder, open_folder, replace_file
from advmeta.table_command import make_table
from advmeta.training_command import WEIGHTS, MetaTrain, Training, take_part, train_and_save

_ACCELERATOR_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin", "libtpu")


@dataclasses.dataclass(frozen=True)
class Run(Training):
    """Meta-train an optimizer, hold it against tuned baselines, and write a report.

    Example: advmeta run --output runs/first --training.outer-steps 300
    """

    table: TransferConfig = TransferConfig()


@dataclasses.dataclass(frozen=True)
class Evaluate(Resumable):
    """Hold a meta-optimizer against tuned baselines, robust training recipes included.

    Writes a report. A run that was killed goes on with --resume, after the last whole column. The
    default table took 39 minutes on 2 CPU cores before its rivals had larger grids, and takes
    longer now. Where time is short, --table.attack pgd leaves out AutoAttack, and --table.rows adam
    adversarial leaves out the other rows.

    Example: advmeta evaluate --weights runs/mine/meta_optimizer.safetensors --table.seeds 5

    Args:
      weights: a name of advmeta.list_pretrained(), or a .safetensors file.
    """

    weights: str = "mixture"
    table: TransferConfig = TransferConfig(rows=tuple(ROWS), attack="autoattack")


@dataclasses.dataclass(frozen=True)
class Report:
    """Write the page of a run anew, or one page that compares several runs.

    Example: advmeta report runs/first runs/second --output runs/both

    Args:
      runs: folders that other commands wrote.
      output: for several runs, the folder of the comparison. By default
        runs/report-DATE-TIME.
    """

    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]] = ()
    output: pathlib.Path | None = None


COMMANDS = {
    "run": Run,
    "meta-train": MetaTrain,
    "evaluate": Evaluate,
    "patch": Patch,
    "attack": Attack,
    "report": Report,
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
    except (FloatingPointError, OSError) as error:  # of the numbers; of the disk or the network
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


def parse(argv: list[str]) -> Run | MetaTrain | Evaluate | Patch | Attack | Report:
    """The command with its resolved config."""
    kinds = [
        Annotated[kind, tyro.conf.subcommand(name, default=_default(kind, name, argv))]
        for name, kind in COMMANDS.items()
    ]
    union: Any = functools.reduce(operator.or_, kinds)
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
        optimizer = functools.partial(
            scale_by_meta_optimizer, meta_params, command.training.meta_optimizer
        )
        weights = tell_apart(folder / WEIGHTS)
        make_table(command.table, optimizer, command.seed, folder, console, weights=weights)
        report.write(folder)
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
    load_meta_optimizer(command.weights)  # an error comes before a folder is made for nothing
    optimizer = functools.partial(load_meta_optimizer, command.weights)
    with open_folder("evaluate", command) as (folder, _):
        for note in _notes(command):
            console.print(note)
        digest = tell_apart(command.weights)
        make_table(
            command.table, optimizer, command.seed, folder, console, weights=digest, check=True
        )
        card = {
            "name": folder.name,
            "command": line,
            "seed": command.seed,
            "weights": command.weights,
            "weights_digest": digest,
            **environment.describe(),
        }
        replace_file(folder / "card.json", (json.dumps(card, indent=2) + "\n").encode())
        report.write(folder)
    return folder


def _notes(command: Evaluate) -> list[str]:
    if is_import_name(command.weights):
        return []
    gradients = command.table.inner_gradients
    return untested_on(load_card(command.weights), command.weights, gradients)


def _report(command: Report, line: str, console: Console) -> pathlib.Path:
    if not command.runs:
        raise ValueError("name the folder of a run, as in: advmeta report runs/first")
    if len(command.runs) > 1:
        folder = command.output or new_folder("report")
        return report.compare(command.runs, folder).parent
    if command.output is not None:
        raise ValueError(
            f"output={str(command.output)!r} is for several runs; the page of one is written into "
            "its own folder"
        )
    return report.write(*command.runs).parent


_DO = {
    Run: _run,
    MetaTrain: _meta_train,
    Evaluate: _evaluate,
    Patch: patch_files,
    Attack: attack,
    Report: _report,
}
