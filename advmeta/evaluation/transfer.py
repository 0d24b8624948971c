"""The transfer table: models and data that the meta-optimizer has not met, against tuned rivals."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from advmeta import data, optimizees
from advmeta.attacks.threat_model import ThreatModel
from advmeta.evaluation.baselines import (
    BASELINES,
    QUICK_ROWS,
    ROWS,
    Choice,
    choose,
    make_one_of,
)
from advmeta.evaluation.curves import epsilon_curves, learning_curves, train_and_keep
from advmeta.evaluation.stronger import with_autoattack
from advmeta.held_out import Accuracy, held_out_accuracy
from advmeta.inner_gradients import RECIPES, InnerGradient, Recipe
from advmeta.meta_optimizer.features import Aim
from advmeta.tasks import Task, aim_at
from advmeta.types import Array, Key, Norm, PyTree
from advmeta.unroll import train, with_replay

Progress = Callable[[str], None]
META_OPTIMIZER = "meta-optimizer"  # its rows' name
# Of a grid: a CNN on CIFAR-10, attacked on a thousand images, takes 0.13 GB.
MODELS_AT_ONCE = 64
MakeMetaOptimizer = Callable[[Aim], optax.GradientTransformation]
Make = Callable[[Any, Task], tuple[optax.GradientTransformation, InnerGradient]]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A column of the table: one architecture on one data set.

    Args:
      setting: what is new in it, for people.
      dataset, optimizee, norm, epsilon: as in `TaskConfig`.
      train_examples: drawn from the training set; None: all of it.
    """

    setting: str
    dataset: str
    optimizee: str
    epsilon: float
    norm: Norm = "linf"
    train_examples: int | None = None

    def __post_init__(self):
        ThreatModel(self.norm, self.epsilon)
        optimizees.by_name(self.optimizee)


CELLS = (
    Cell("same architecture", "digits", "mlp-20", 0.1),
    Cell("wider", "digits", "mlp-40", 0.1),
    Cell("deeper", "digits", "mlp-20-20", 0.1),
    Cell("other activation", "digits", "mlp-20-tanh", 0.1),
    Cell("CNN", "digits", "cnn-4-8", 0.1),
    Cell("other data set", "fashion_small", "mlp-20", 0.05),
)


@dataclasses.dataclass(frozen=True)
class TransferConfig:
    """How the table is made.

    Args:
      cells: its columns.
      rows: names of its rows, of `baselines.ROWS`; the meta-optimizer's come after them.
      inner_gradients: of the meta-optimizer's rows, of `RECIPES`; the first one's models are those
        that are looked at closely.
      inner_steps: of every row alike.
      batch_size: examples an inner step.
      seeds: models trained for each entry; mean and spread are over them.
      tuning_seeds: models trained for each point of a baseline's grid; more where it is small.
      validation: fraction of the training set on which the grid is judged.
      attack: what gives robust accuracy on the test set, "pgd" or "autoattack"; the second, its
        standard version, comes with PGD's number beside it.
      attack_steps, restarts: of that PGD, which raises the margin.
    """

    cells: tuple[Cell, ...] = CELLS
    rows: tuple[str, ...] = QUICK_ROWS
    inner_gradients: tuple[str, ...] = ("clean",)
    inner_steps: int = 200
    batch_size: int = 128
    seeds: int = 3
    tuning_seeds: int = 2
    validation: float = 0.2
    attack: Literal["pgd", "autoattack"] = "pgd"
    attack_steps: int = 40
    restarts: int = 3

    def __post_init__(self):
        unknown = [name for name in self.rows if name not in ROWS]
        if unknown:
            raise ValueError(f"rows={unknown} are unknown; the known ones are {list(ROWS)}")
        unknown = [name for name in self.inner_gradients if name not in RECIPES]
        if unknown or not self.inner_gradients:
            raise ValueError(
                f"inner_gradients={self.inner_gradients}: {unknown or 'none'} cannot be used; the "
                f"known ones are {list(RECIPES)}, and there must be at least one"
            )
        if self.attack not in ("pgd", "autoattack"):
            raise ValueError(f"attack={self.attack!r} is unknown; write 'pgd' or 'autoattack'")
        for name in ("inner_steps", "seeds", "tuning_seeds", "attack_steps", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def entries(self) -> int:
        """Rows, the meta-optimizer's too."""
        return len(self.rows) + len(self.inner_gradients)


class Entry(NamedTuple):
    """A row in a cell, with the hyperparameters that were chosen for it there."""

    optimizer: str
    inner_gradient: str
    make: Make  # entries with the same one are compiled once
    choice: Choice | None  # scalars; None: there is nothing to tune
    recipe: Recipe  # for its cost
    tuning_runs: int


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


def tune(config: TransferConfig, task: Task, key: Key) -> list[Entry]:
    """The best point of each row's grid, by robust accuracy on the held-out part of the task."""
    rows = [ROWS[name] for name in config.rows]
    groups = {BASELINES[row.baseline].recipe: [] for row in rows}
    for name in dict.fromkeys(row.baseline for row in rows):
        groups[BASELINES[name].recipe].append(name)
    # XLA compiles a program on one core, so several at a time; run, each takes all the memory.
    with ThreadPoolExecutor() as pool:
        programs = pool.map(
            lambda names: score_grids.lower(config, tuple(names), task, key).compile(),
            groups.values(),
        )
    scores = {name: score for program in programs for name, score in program(task, key).items()}
    makes = {
        recipe: functools.partial(make_one_of, names, config.inner_steps)
        for recipe, names in groups.items()
    }
    entries = []
    for row in rows:
        baseline = BASELINES[row.baseline]
        which = jnp.int32(groups[baseline.recipe].index(row.baseline))
        choice = Choice(which, choose(baseline.grid, scores[row.baseline], row.belongs))
        points = int(row.belongs(baseline.grid).sum())
        runs = points * config.tuning_seeds * baseline.repeats
        make, recipe = makes[baseline.recipe], RECIPES[baseline.recipe]
        entries.append(Entry(row.optimizer, row.inner_gradient, make, choice, recipe, runs))
    return entries


@functools.partial(jax.jit, static_argnums=(0, 1))
def score_grids(
    config: TransferConfig, names: tuple[str, ...], task: Task, key: Key
) -> dict[str, Array]:
    """Robust validation accuracy of every point of some baselines' grids, [g] each.

    The baselines have the same recipe and repeats.
    """
    baselines = [BASELINES[name] for name in names]

    def run(choice: Choice, key: Key) -> Array:
        train_key, attack_key = jax.random.split(key)
        optimizer, inner_gradient = make_one_of(names, config.inner_steps, choice, task)
        params, _ = train(
            task, optimizer, train_key, steps=config.inner_steps, inner_gradient=inner_gradient
        )
        return held_out_accuracy(task, params, attack_key, attack_steps=20, restarts=1).robust

    keys = jax.random.split(key, config.tuning_seeds * baselines[0].repeats)
    grids = [baseline.grid for baseline in baselines]
    points = jax.tree.map(lambda *axes: jnp.concatenate(axes), *grids)
    sizes = [len(grid.noise) for grid in grids]
    choices = Choice(jnp.array(np.repeat(np.arange(len(names)), sizes)), points)
    # Seeds are the inner axis: what they draw is drawn once for all points of a chunk.
    over_seeds = jax.vmap(run, in_axes=(None, 0))
    most = max(1, MODELS_AT_ONCE // len(keys))
    chunk = max(n for n in range(1, most + 1) if sum(sizes) % n == 0)
    scores = jax.lax.map(lambda choice: over_seeds(choice, keys), choices, batch_size=chunk)
    scores = scores.mean(axis=-1)
    return dict(zip(names, jnp.split(scores, np.cumsum(sizes)[:-1]), strict=True))


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
