"""The transfer table: models and data that the meta-optimizer has not met, against tuned rivals."""

import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import optax

from advmeta import data, optimizees
from advmeta.attacks.threat_model import ThreatModel
from advmeta.evaluation.baselines import Choice
from advmeta.evaluation.curves import epsilon_curves, learning_curves, train_and_keep
from advmeta.evaluation.stronger import with_autoattack
from advmeta.evaluation.transfer_config import Cell, TransferConfig
from advmeta.evaluation.tuning import Entry, Make, tune
from advmeta.held_out import Accuracy, held_out_accuracy
from advmeta.inner_gradients import RECIPES, InnerGradient
from advmeta.meta_optimizer.features import Aim
from advmeta.tasks import Task, aim_at
from advmeta.types import Key, PyTree
from advmeta.unroll import with_replay

Progress = Callable[[str], None]
META_OPTIMIZER = "meta-optimizer"  # its rows' name
MakeMetaOptimizer = Callable[[Aim], optax.GradientTransformation]


def transfer_cells(
    config: TransferConfig,
    meta_optimizer: MakeMetaOptimizer,
    *,
    key: Key,
    first: int = 0,
    report: Progress = lambda message: None,
    keep: Callable[[Entry, Task, PyTree], None] = lambda entry, task, params: None,
) -> Iterator[tuple[list[dict], dict[str, list[dict]]]]:
    """Trains and attacks every row, cell after cell.

    Baselines are tuned for each cell on a part of its training set; the meta-optimizer is used as
    it is. Then each trains ``seeds`` models on the whole training set, all for the same number of
    inner steps, and PGD, and where it is asked for AutoAttack, attack them on the test set.

    Args:
      config: see `TransferConfig`.
      meta_optimizer: from what it is told of each cell to an optax transformation that needs no
        learning rate.
      key: the same key gives the same table.
      first: the cell to begin with; a cell's numbers do not depend on it.
      report: called with a message when something starts.
      keep: called with what each row trained in each cell, models stacked over the seeds.

    Yields:
      For each cell the records, one a row and seed; and its curves, for the first cell alone:
      accuracy along training ("learning") and robust accuracy against epsilon ("epsilon").
    """

    def ours(recipe: str) -> Entry:
        def make(choice: None, task: Task) -> tuple[optax.GradientTransformation, InnerGradient]:
            aim = aim_at(task.threat_model, config.inner_steps)
            return meta_optimizer(aim), RECIPES[recipe].inner_gradient

        return Entry(META_OPTIMIZER, recipe, make, None, RECIPES[recipe], 0)

    for index, cell in enumerate(config.cells[first:], first):
        tune_key, train_key, attack_key = cell_keys(key, index)
        keys = jax.random.split(train_key, config.seeds)
        tuning, task = make_tasks(config, cell)
        report(f"{cell.setting}: tuning the baselines")
        entries = tune(config, tuning, tune_key)
        if "replayed" in config.inner_gradients:
            task = with_replay(task, train_key)
        entries += map(ours, config.inner_gradients)
        compiled = compile_trainings(config, task, entries, keys)
        records, curves = [], {"learning": [], "epsilon": []}
        for entry in entries:
            report(f"{cell.setting}: {entry.optimizer}, {entry.inner_gradient} gradients")
            path, seconds = timed(compiled[entry.make], task, entry.choice, keys)
            params = jax.tree.map(lambda leaf: leaf[:, -1], path)
            keep(entry, task, params)
            accuracy = judge(config, task, params, attack_key)
            found = _records(config, cell, entry, accuracy, seconds)
            if config.attack == "autoattack":
                report(f"{cell.setting}: AutoAttack on {entry.optimizer}, {entry.inner_gradient}")
                found = with_autoattack(task, params, attack_key, found)
            records += found
            if index == 0:
                _add_curves(config, task, entry, path, attack_key, curves)
        # No later cell has these shapes. A compiled program takes hundreds of memory maps, and
        # Linux allows a process 65,530: a table of six cells with AutoAttack needs more.
        jax.clear_caches()
        yield records, curves


def cell_keys(key: Key, index: int) -> Key:
    """For tuning, training and attacking in a cell, [3]."""
    return jax.random.split(jax.random.fold_in(key, index), 3)


def make_tasks(config: TransferConfig, cell: Cell) -> tuple[Task, Task]:
    """The task to tune on, cut from the training set, and the one to report."""
    dataset = data.load(cell.dataset, train_examples=cell.train_examples)
    rest, validation = data.split(dataset.train, config.validation)
    make = functools.partial(
        Task,
        threat_model=ThreatModel(cell.norm, cell.epsilon),
        optimizee=optimizees.by_name(cell.optimizee, dataset.num_classes),
        batch_size=config.batch_size,
    )
    return make(rest, validation), make(dataset.train, dataset.test)


def compile_trainings(
    config: TransferConfig, task: Task, entries: list[Entry], keys: Key
) -> dict[Make, Callable]:
    """For each way to make an optimizer: (task, choice, keys) -> what `train_and_keep` gives.

    Its leaves are [keys, points, ...].
    """

    def compile_training(entry: Entry) -> Callable:
        def run(task: Task, choice: Choice | None, keys: Key) -> PyTree:
            optimizer, inner_gradient = entry.make(choice, task)
            train_one = functools.partial(
                train_and_keep, task, optimizer,
                steps=config.inner_steps, inner_gradient=inner_gradient,
            )  # fmt: skip
            return jax.vmap(train_one)(keys)

        return jax.jit(run).lower(task, entry.choice, keys).compile()

    distinct = {entry.make: entry for entry in entries}
    with ThreadPoolExecutor() as pool:
        return dict(zip(distinct, pool.map(compile_training, distinct.values()), strict=True))


def timed(compiled: Callable, task: Task, choice: Choice | None, keys: Key) -> tuple[PyTree, float]:
    """What a compiled training returns, and the seconds it took for each model."""
    start = time.perf_counter()
    params = jax.block_until_ready(compiled(task, choice, keys))
    return params, (time.perf_counter() - start) / len(keys)


@functools.partial(jax.jit, static_argnums=0)
def judge(config: TransferConfig, task: Task, params: PyTree, key: Key) -> Accuracy:
    """Accuracy on the test set of models stacked along the first axis, [seeds]."""
    attack = functools.partial(
        held_out_accuracy, attack_steps=config.attack_steps, restarts=config.restarts
    )
    return jax.vmap(lambda p: attack(task, p, key))(params)


def _records(
    config: TransferConfig, cell: Cell, entry: Entry, accuracy: Accuracy, seconds: float
) -> list[dict]:
    evaluations = config.inner_steps * entry.recipe.gradient_evaluations
    examples = config.inner_steps * config.batch_size * entry.recipe.adversarial_examples
    point = entry.choice.point._asdict() if entry.choice else {}
    shared = {
        "dataset": cell.dataset,
        "architecture": cell.optimizee,
        "setting": cell.setting,
        "norm": cell.norm,
        "epsilon": cell.epsilon,
        "optimizer": entry.optimizer,
        "inner_gradient": entry.inner_gradient,
        "inner_steps": config.inner_steps,
        "attack": f"pgd-margin-{config.attack_steps}x{config.restarts}",
        "gradient_evaluations": evaluations,
        "adversarial_examples": examples,
        "tuning_gradient_evaluations": evaluations * entry.tuning_runs,
        "seconds": seconds,
        "hyperparameters": {name: round(float(value), 9) for name, value in point.items()},
    }
    return [
        {**shared, "seed": seed, "clean_accuracy": float(clean), "robust_accuracy": float(robust)}
        for seed, (clean, robust) in enumerate(zip(*accuracy, strict=True))
    ]


def _add_curves(
    config: TransferConfig, task: Task, entry: Entry, path: PyTree, key: Key, curves: dict
) -> None:
    who = {"optimizer": entry.optimizer, "inner_gradient": entry.inner_gradient}
    curves["learning"] += learning_curves(task, path, key, steps=config.inner_steps, who=who)
    params = jax.tree.map(lambda leaf: leaf[:, -1], path)
    curves["epsilon"] += epsilon_curves(
        task, params, key, attack_steps=config.attack_steps, who=who
    )
