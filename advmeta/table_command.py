"""The transfer table of `advmeta run` and `advmeta evaluate`, column by column into a folder."""

import dataclasses
import json
import pathlib

import jax
import optax
from jax.tree_util import Partial
from rich.console import Console

from advmeta import report
from advmeta.attacks.losses import margin
from advmeta.evaluation.behaviour import behaviour
from advmeta.evaluation.sanity import Check, sanity_checks
from advmeta.evaluation.transfer import (
    META_OPTIMIZER,
    MakeMetaOptimizer,
    cell_keys,
    transfer_cells,
)
from advmeta.evaluation.transfer_config import TransferConfig
from advmeta.evaluation.tuning import Entry
from advmeta.evaluation.twins import twins
from advmeta.progress import TableProgress
from advmeta.run_folder import differences, replace_file
from advmeta.tasks import Task, aim_at
from advmeta.types import Key, PyTree

_ADAM_RATE = 0.01  # the usual choice for small models


def make_table(
    config: TransferConfig,
    optimizer: MakeMetaOptimizer,
    seed: int,
    folder: pathlib.Path,
    console: Console,
    *,
    weights: str,
    check: bool = False,
) -> None:
    """Makes what is missing of the table in the folder, and prints it.

    The folder gets results.json, which grows by a column at a time. Before its first column it gets
    table.json, what the columns are made of, curves.json, and of the meta-optimizer's first model
    behaviour.json, twins.json and, if ``check``, sanity.json.

    Args:
      weights: tells ``optimizer`` from others, as `weights_digest` does.

    Raises:
      ValueError: the folder holds columns of another config, other weights or another seed.
    """
    made_of = {"weights": weights, "seed": seed, "table": dataclasses.asdict(config)}
    _check_same(folder, json.loads(json.dumps(made_of)))
    results, key = folder / "results.json", jax.random.key(seed)
    models: list[tuple[Task, PyTree]] = []
    records = json.loads(results.read_text()) if results.exists() else []
    done = len(records) // (config.entries * config.seeds)

    def keep(entry: Entry, task: Task, params: PyTree) -> None:
        if entry.optimizer == META_OPTIMIZER and not models:
            models.append((task, params))

    with TableProgress(config, console, done) as bar:
        cells = transfer_cells(config, optimizer, key=key, first=done, report=bar.update, keep=keep)
        for found, curves in cells:
            if not records:
                bar.update("a closer look at the first model")
                looks = _look_closely(config, optimizer, *models[0], key, check)
                for name, content in {"curves": curves, **looks}.items():
                    replace_file(folder / f"{name}.json", (json.dumps(content) + "\n").encode())
            records += found
            replace_file(results, (json.dumps(records, indent=1) + "\n").encode())
    console.print(report.table(records))
    if check:
        console.print(report.checks(json.loads((folder / "sanity.json").read_text())))


def _check_same(folder: pathlib.Path, made_of: dict) -> None:
    """Raises a ValueError if there are columns of something else; with none, says what is begun."""
    path = folder / "table.json"
    if not (folder / "results.json").exists():
        replace_file(path, (json.dumps(made_of, indent=1) + "\n").encode())
        return
    was = json.loads(path.read_text()) if path.exists() else dict.fromkeys(made_of)
    if found := differences(was, made_of):
        raise ValueError(
            f"{folder} holds columns made with {'; '.join(found)}: give the same to go on with "
            "them, or another folder"
        )


def _look_closely(
    config: TransferConfig,
    optimizer: MakeMetaOptimizer,
    task: Task,
    params: PyTree,
    key: Key,
    check: bool,
) -> dict[str, object]:
    """What is written of the models of the first cell, which are stacked over the seeds."""
    _, train_key, attack_key = cell_keys(key, 0)
    first_key = jax.random.split(train_key, config.seeds)[0]
    ours = optimizer(aim_at(task.threat_model, config.inner_steps))
    optimizers = {META_OPTIMIZER: ours, f"adam {_ADAM_RATE:g}": optax.adam(_ADAM_RATE)}
    first = jax.tree.map(lambda leaf: leaf[0], params)
    looks = {
        "behaviour": behaviour(task, optimizers, first_key, steps=config.inner_steps),
        "twins": twins(task, first, attack_key),
    }
    if check:
        looks["sanity"] = [c._asdict() for c in _check(config, task, params, key)]
    return looks


def _check(config: TransferConfig, task: Task, params: PyTree, key: Key) -> list[Check]:
    """Sanity checks of the model of seed 0; that of seed 1, if there is one, is the surrogate."""
    models = [
        Partial(task.optimizee.apply, jax.tree.map(lambda leaf, seed=seed: leaf[seed], params))
        for seed in range(min(config.seeds, 2))
    ]
    return sanity_checks(
        models[0], *task.held_out, threat_model=task.threat_model, key=key,
        attack_steps=config.attack_steps, restarts=config.restarts, loss=margin,
        surrogate=models[1] if len(models) > 1 else None,
    )  # fmt: skip
