"""Accuracy along training, and robust accuracy against epsilon, as records that can be plotted."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from advmeta.held_out import Accuracy, held_out_accuracy
from advmeta.inner_gradients import InnerGradient
from advmeta.tasks import Task
from advmeta.types import Array, Key, PyTree
from advmeta.unroll import InnerState, init_inner, unroll

EPSILON_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
LEARNING_POINTS = 20


def learning_steps(steps: int) -> list[int]:
    """After which inner steps a training of so many is looked at; the last is its end."""
    every = _every(steps)
    return list(range(steps % every + every, steps + 1, every))


def _every(steps: int) -> int:
    return max(1, steps // LEARNING_POINTS)


def train_and_keep(
    task: Task,
    optimizer: optax.GradientTransformation,
    key: Key,
    *,
    steps: int,
    inner_gradient: InnerGradient,
    keep: Callable[[InnerState], PyTree] = lambda state: state.params,
) -> PyTree:
    """As `train`: what is kept after each of `learning_steps`, stacked [points, ...]."""
    init_key, episode_key = jax.random.split(key)
    take_steps = functools.partial(unroll, task, optimizer, inner_gradient=inner_gradient)
    every = _every(steps)
    state = init_inner(task, optimizer, init_key, inner_gradient)
    if steps % every:
        state, _ = take_steps(state, episode_key, steps=steps % every)

    def segment(state, _):
        state, _ = take_steps(state, episode_key, steps=every)
        return state, keep(state)

    return jax.lax.scan(segment, state, length=steps // every)[1]


def learning_curves(task: Task, path: PyTree, key: Key, *, steps: int, who: dict) -> list[dict]:
    """Held-out accuracy along trainings, attacked by PGD-10; a record a training.

    ``path`` holds models stacked [trainings, points, ...], from `train_and_keep`. Each record holds
    what is in ``who``, seed, steps, clean_accuracy and robust_accuracy.
    """
    clean, robust = _learning_curves(task, path, key)
    return [
        {**who, "seed": seed, "steps": learning_steps(steps), "clean_accuracy": c,
         "robust_accuracy": r}
        for seed, (c, r) in enumerate(zip(clean.tolist(), robust.tolist(), strict=True))
    ]  # fmt: skip


@jax.jit
def _learning_curves(task: Task, path: PyTree, key: Key) -> Accuracy:
    def at(params: PyTree) -> Accuracy:
        return held_out_accuracy(task, params, key, attack_steps=10, restarts=1)

    return jax.lax.map(jax.vmap(at), path)


def epsilon_curves(
    task: Task, params: PyTree, key: Key, *, attack_steps: int, who: dict
) -> list[dict]:
    """Robust accuracy at multiples of the task's epsilon, PGD with one restart; a record a model.

    ``params`` are models stacked along the first axis. Each record holds what is in ``who``, seed,
    epsilons and robust_accuracy.
    """
    robust = _epsilon_curves(task, params, key, attack_steps)
    epsilons = [factor * float(task.threat_model.epsilon) for factor in EPSILON_FACTORS]
    return [
        {**who, "seed": seed, "epsilons": epsilons, "robust_accuracy": values}
        for seed, values in enumerate(robust.tolist())
    ]


@functools.partial(jax.jit, static_argnums=3)
def _epsilon_curves(task: Task, params: PyTree, key: Key, attack_steps: int) -> Array:
    def at(factor, params):
        epsilon = factor * task.threat_model.epsilon
        threat_model = dataclasses.replace(task.threat_model, epsilon=epsilon)
        moved = dataclasses.replace(task, threat_model=threat_model)
        return held_out_accuracy(moved, params, key, attack_steps=attack_steps, restarts=1).robust

    over_factors = jax.vmap(at, in_axes=(0, None))
    return jax.vmap(over_factors, in_axes=(None, 0))(jnp.array(EPSILON_FACTORS), params)
