"""Accuracy along training, and robust accuracy against epsilon, as records that can be plotted."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from advmeta.held_out import Accuracy, held_out_accuracy
from advmeta.tasks import Task
from advmeta.types import Array, Key, PyTree
from advmeta.unroll import init_inner, unroll

EPSILON_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
LEARNING_POINTS = 20


def learning_curves(
    make: Callable, point: PyTree, task: Task, keys: Key, *, steps: int, who: dict
) -> list[dict]:
    """Held-out accuracy at about 20 points of an episode, attacked by PGD-10; a record a key.

    ``make(point, task)`` gives the optimizer and the inner gradient. Each record holds what is in
    ``who``, seed, steps, clean_accuracy and robust_accuracy.
    """
    every = max(1, steps // LEARNING_POINTS)
    clean, robust = _learning_curves(make, every, steps // every, point, task, keys)
    at = [every * (i + 1) for i in range(steps // every)]
    return [
        {**who, "seed": seed, "steps": at, "clean_accuracy": c, "robust_accuracy": r}
        for seed, (c, r) in enumerate(zip(clean.tolist(), robust.tolist(), strict=True))
    ]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _learning_curves(
    make: Callable, every: int, points: int, point: PyTree, task: Task, keys: Key
) -> Accuracy:
    optimizer, inner_gradient = make(point, task)

    def run(key: Key) -> Accuracy:
        init_key, episode_key = jax.random.split(key)

        def segment(state, _):
            state, _ = unroll(
                task, optimizer, state, episode_key, steps=every, inner_gradient=inner_gradient
            )
            return state, held_out_accuracy(
                task, state.params, episode_key, attack_steps=10, restarts=1
            )

        state = init_inner(task, optimizer, init_key, inner_gradient)
        return jax.lax.scan(segment, state, length=points)[1]

    return jax.vmap(run)(keys)


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
