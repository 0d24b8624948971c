"""What an optimizer does to the weights while it trains a model, next to others.

The others do not train it: at each step they are asked for their update of the same gradient.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from advmeta.evaluation.curves import learning_steps, train_and_keep
from advmeta.inner_gradients import clean
from advmeta.meta_optimizer.layers import layer_positions
from advmeta.tasks import Task
from advmeta.types import Key, Params

BINS = 24  # of equally many coordinates


class Moves(NamedTuple):
    """One inner step, as an optimizer's state; every leaf is a tree like the parameters."""

    states: tuple[optax.OptState, ...]
    params: Params  # before the step
    gradient: Params
    updates: tuple[Params, ...]  # of each optimizer; the first one's was made


def watched(
    optimizers: Sequence[optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """The first of the optimizers; its state is `Moves`, with what the others would have done."""
    extended = [optax.with_extra_args_support(optimizer) for optimizer in optimizers]

    def init(params: Params) -> Moves:
        states = tuple(optimizer.init(params) for optimizer in optimizers)
        nothing = jax.tree.map(jnp.zeros_like, params)
        return Moves(states, params, nothing, (nothing,) * len(optimizers))

    def update(updates, state, params: Params = None, **extra_args):
        pairs = [
            optimizer.update(updates, each, params, **extra_args)
            for optimizer, each in zip(extended, state.states, strict=True)
        ]
        made, states = zip(*pairs, strict=True)
        return made[0], Moves(states, params, updates, made)

    return optax.GradientTransformationExtraArgs(init, update)


def behaviour(
    task: Task,
    optimizers: Mapping[str, optax.GradientTransformation],
    key: Key,
    *,
    steps: int,
) -> dict[str, list[dict]]:
    """Watches a training of clean gradients, at about twenty of its steps.

    Args:
      task: data and model.
      optimizers: by name; the first one trains.
      key: as `advmeta.train` takes it.
      steps: inner steps.

    Returns:
      Three lists of dicts that JSON can hold, each with its "optimizer":

      * "against_gradient": the update along the negative gradient, ``-u sign(g)``, against
        ``|g| / rms(g)`` over the weight's tensor; in bins of equally many weights their median
        x and the "low", "median" and "high" quartiles. Weights whose gradient is zero are left out.
      * "against_parameter": in the same way the update ``u`` against ``w / rms(w)``.
      * "effective_step": for each "layer" of weights ``rms(u) / rms(w)`` against "steps".

      Biases are in none of them.

    Example:
      >>> from advmeta.evaluation.behaviour import behaviour
      >>> digits = advmeta.data.load("digits", train_examples=100)
      >>> task = advmeta.Task(digits.train, digits.test, advmeta.ThreatModel(),
      ...                     advmeta.optimizees.linear(), batch_size=32)
      >>> seen = behaviour(task, {"sign": optax.sign_sgd(0.01)}, jax.random.key(0), steps=20)
      >>> set(seen["against_gradient"][0]["median"])  # whatever the gradient
      {0.01}
    """
    moves = jax.tree.map(np.asarray, _watch(task, tuple(optimizers.values()), key, steps))
    places = _weights(moves.params)
    params, gradient = places.of(moves.params), places.of(moves.gradient)
    seen = {"against_gradient": [], "against_parameter": [], "effective_step": []}
    for name, tree in zip(optimizers, moves.updates, strict=True):
        updates = places.of(tree)
        descent = [-u * np.sign(g) for u, g in zip(updates, gradient, strict=True)]
        there = np.concatenate([g.ravel() != 0 for g in gradient])
        seen["against_gradient"].append(
            {
                "optimizer": name,
                **_quartiles(np.abs(_scaled(gradient))[there], _flat(descent)[there]),
            }
        )
        seen["against_parameter"].append(
            {"optimizer": name, **_quartiles(_scaled(params), _flat(updates))}
        )
        for layer, u, w in zip(places.names, updates, params, strict=True):
            share = _rms(u).ravel() / _rms(w).ravel()
            seen["effective_step"].append(
                {"optimizer": name, "layer": layer, "steps": learning_steps(steps),
                 "share": _short(share)}
            )  # fmt: skip
    return seen


@functools.partial(jax.jit, static_argnames=("optimizers", "steps"))
def _watch(task: Task, optimizers: tuple, key: Key, steps: int) -> Moves:
    """What was done at each of `learning_steps`, stacked [points, ...]; without the states."""
    return train_and_keep(
        task, watched(optimizers), key, steps=steps, inner_gradient=clean,
        keep=lambda state: state.opt_state._replace(states=()),
    )  # fmt: skip


class _Places(NamedTuple):
    """Where the weights are among the leaves."""

    names: list[str]
    indices: list[int]

    def of(self, tree: Params) -> list[np.ndarray]:
        leaves = jax.tree.leaves(tree)
        return [leaves[index].astype(np.float64) for index in self.indices]


def _weights(params: Params) -> _Places:
    """All tensors but biases; ``params`` has a leading axis of points, which is no axis of them."""
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    positions = layer_positions(jax.tree.map(lambda leaf: leaf[0], params))
    weights = [i for i, position in enumerate(positions) if not position.bias]
    names = [jax.tree_util.keystr(paths[i][0], simple=True, separator="/") for i in weights]
    return _Places(names, weights)


def _rms(x: np.ndarray) -> np.ndarray:
    """Over each point's tensor, [points, 1, ...]."""
    return np.sqrt(np.square(x).mean(axis=tuple(range(1, x.ndim)), keepdims=True))


def _scaled(tensors: list[np.ndarray]) -> np.ndarray:
    return _flat([x / np.maximum(_rms(x), 1e-30) for x in tensors])


def _flat(tensors: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([x.ravel() for x in tensors])


def _quartiles(x: np.ndarray, y: np.ndarray) -> dict[str, list[float]]:
    """Of y, in bins of equally many x."""
    order = np.argsort(x, kind="stable")
    bins = [part for part in np.array_split(order, BINS) if part.size]
    low, median, high = np.array([np.quantile(y[part], (0.25, 0.5, 0.75)) for part in bins]).T
    return {
        "x": _short([np.median(x[part]) for part in bins]),
        "low": _short(low),
        "median": _short(median),
        "high": _short(high),
    }


def _short(values) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
