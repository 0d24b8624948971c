"""Tuning: the best point of each baseline's grid, for one column of the table."""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from advmeta.evaluation.baselines import BASELINES, ROWS, Choice, choose, make_one_of
from advmeta.evaluation.transfer_config import TransferConfig
from advmeta.held_out import held_out_accuracy
from advmeta.inner_gradients import RECIPES, InnerGradient, Recipe
from advmeta.tasks import Task
from advmeta.types import Array, Key
from advmeta.unroll import train

# Of a grid: a CNN on CIFAR-10, attacked on a thousand images, takes 0.13 GB.
MODELS_AT_ONCE = 64
Make = Callable[[Any, Task], tuple[optax.GradientTransformation, InnerGradient]]


class Entry(NamedTuple):
    """A row in a cell, with the hyperparameters that were chosen for it there."""

    optimizer: str
    inner_gradient: str
    make: Make  # entries with the same one are compiled once
    choice: Choice | None  # scalars; None: there is nothing to tune
    recipe: Recipe  # for its cost
    tuning_runs: int


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
    all_points = jax.tree.map(lambda *axes: jnp.concatenate(axes), *grids)
    sizes = [len(grid.noise) for grid in grids]
    choices = Choice(jnp.array(np.repeat(np.arange(len(names)), sizes)), all_points)
    # Seeds are the inner axis: what they draw is drawn once for all points of a chunk.
    over_seeds = jax.vmap(run, in_axes=(None, 0))
    points, most = sum(sizes), max(1, MODELS_AT_ONCE // len(keys))
    chunk = math.ceil(points / math.ceil(points / most))
    # Full chunks alone, the last point several times, so that one program is compiled for all.
    full = np.minimum(np.arange(math.ceil(points / chunk) * chunk), points - 1)
    choices = jax.tree.map(lambda values: values[full], choices)
    scores = jax.lax.map(lambda choice: over_seeds(choice, keys), choices, batch_size=chunk)
    scores = scores.mean(axis=-1)[:points]
    return dict(zip(names, jnp.split(scores, np.cumsum(sizes)[:-1]), strict=True))
