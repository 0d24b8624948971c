"""The ordinary optimizers that the meta-optimizer is held against, each with its grid."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from advmeta.inner_gradients import RECIPES, InnerGradient, noisy
from advmeta.meta_optimizer.features import warm_up
from advmeta.tasks import Task
from advmeta.types import Array, Key, Params


class Hyperparameters(NamedTuple):
    """What is tuned; arrays [g], one entry a point of the grid, or scalars of one point."""

    learning_rate: Array
    weight_decay: Array
    noise: Array  # of the Gaussian input noise, see `Task`
    annealed: Array  # 1: the learning rate follows a half cosine to zero; 0: it is constant


class Baseline(NamedTuple):
    """An optimizer, the inner gradient it is given, and what is tried for it."""

    optimizer: Callable[[Hyperparameters, int], optax.GradientTransformation]
    recipe: str  # of RECIPES; the clean one is given the noise of each point
    grid: Hyperparameters
    repeats: int = 1  # a small grid is judged on so many times the models

    def inner_gradient(self, point: Hyperparameters) -> InnerGradient:
        """That of the recipe, at a point of the grid."""
        if self.recipe != "clean":
            return RECIPES[self.recipe].inner_gradient

        def with_noise(task: Task, params: Params, key: Key) -> tuple[Array, Params]:
            return noisy(dataclasses.replace(task, noise=point.noise), params, key)

        return with_noise


class Choice(NamedTuple):
    """One of some baselines, and a point of its grid; traced, so that one program serves all."""

    which: Array  # [] int32
    point: Hyperparameters


class Row(NamedTuple):
    """A row of the table: the best point of a part of a baseline's grid."""

    optimizer: str
    inner_gradient: str
    baseline: str
    belongs: Callable[[Hyperparameters], Array]  # which points of the grid, bool [g]


def adam(point: Hyperparameters, steps: int) -> optax.GradientTransformation:
    """Adam with L2 regularisation: the decay is a part of the gradient."""
    return optax.chain(
        optax.add_decayed_weights(point.weight_decay), optax.adam(_schedule(point, steps))
    )


def sgd(point: Hyperparameters, steps: int) -> optax.GradientTransformation:
    """SGD with momentum 0.9 and L2 regularisation."""
    return optax.chain(
        optax.add_decayed_weights(point.weight_decay),
        optax.sgd(_schedule(point, steps), momentum=0.9),
    )


def adamw(point: Hyperparameters, steps: int) -> optax.GradientTransformation:
    """Adam with decoupled decay (Loshchilov and Hutter 2019)."""
    return optax.adamw(_schedule(point, steps), weight_decay=point.weight_decay)


def _schedule(point: Hyperparameters, steps: int) -> optax.Schedule:
    falling = optax.cosine_decay_schedule(1.0, steps)

    def rate(count: ArrayLike) -> Array:
        rising = warm_up(count, steps)
        return point.learning_rate * rising * jnp.where(point.annealed, falling(count), 1.0)

    return rate


def one_of(
    which: Array, optimizers: Sequence[optax.GradientTransformation]
) -> optax.GradientTransformation:
    """The optimizer at an index [] that may be traced; only its own update is computed.

    (Under `jax.vmap` over the index all are computed. Compiling a program for each takes longer.)
    """

    def init(params: Params) -> tuple:
        return tuple(optimizer.init(params) for optimizer in optimizers)

    def update(updates, state, params: Params | None = None):
        def update_with(index: int) -> tuple[Params, tuple]:
            new, new_state = optimizers[index].update(updates, state[index], params)
            return new, (*state[:index], new_state, *state[index + 1 :])

        branches = [functools.partial(update_with, index) for index in range(len(optimizers))]
        return jax.lax.switch(which, branches)

    return optax.GradientTransformation(init, update)


def make_one_of(
    names: Sequence[str], steps: int, choice: Choice, task: Task
) -> tuple[optax.GradientTransformation, InnerGradient]:
    """The optimizer that was chosen among baselines of one recipe, and the inner gradient."""
    del task  # what tunes itself may look at it
    baselines = [BASELINES[name] for name in names]
    optimizer = one_of(choice.which, [b.optimizer(choice.point, steps) for b in baselines])
    return optimizer, baselines[0].inner_gradient(choice.point)


_ADAM_RATES, _SGD_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), (1e-2, 3e-2, 1e-1, 3e-1)
_L2 = (0.0, 3e-3, 1e-2, 3e-2, 1e-1)
_DECAY = (0.0, 0.3, 1.0, 3.0, 10.0)
_NOISE = (0.0, 0.125, 0.25, 0.5, 1.0)


def grid(*axes: tuple[float, ...]) -> Hyperparameters:
    """All combinations of the values of each hyperparameter, [g] each."""
    points = np.array(list(itertools.product(*axes)), np.float32)
    return Hyperparameters(*points.T)


_ROBUST_GRID = grid(_ADAM_RATES[1:], _L2[:3], (0.0,), (1.0,))
_ROBUST_RECIPES = ("adversarial", "trades", "fgsm-rs", "free", "remembered", "yopo", "vat")

BASELINES = {
    # The best falling rate was level with the best constant one or above, on all gradients.
    "adam": Baseline(adam, "clean", grid(_ADAM_RATES, _L2, _NOISE, (1.0,))),
    "sgd": Baseline(sgd, "clean", grid(_SGD_RATES, _L2, _NOISE, (1.0,))),
    "adamw": Baseline(adamw, "clean", grid(_ADAM_RATES, _DECAY, _NOISE, (1.0,))),
    **{
        # Robust recipes are unsteady on so small models: the choice needs more of them.
        recipe: Baseline(adam, recipe, _ROBUST_GRID, repeats=4)
        for recipe in _ROBUST_RECIPES
    },
}


def _plain(point: Hyperparameters) -> Array:
    return (point.noise == 0) & (point.weight_decay == 0)


def _no_noise(point: Hyperparameters) -> Array:
    return point.noise == 0


def _noise(point: Hyperparameters) -> Array:
    return point.noise > 0


ROWS = {
    "adam-no-decay": Row("adam, no decay", "clean", "adam", _plain),
    "adam": Row("adam", "clean", "adam", _no_noise),
    "sgd": Row("sgd", "clean", "sgd", _no_noise),
    "adamw": Row("adamw", "clean", "adamw", _no_noise),
    "adam-noisy": Row("adam", "noisy", "adam", _noise),
    "sgd-noisy": Row("sgd", "noisy", "sgd", _noise),
    "adamw-noisy": Row("adamw", "noisy", "adamw", _noise),
    **{recipe: Row("adam", recipe, recipe, _no_noise) for recipe in _ROBUST_RECIPES},
}
# Without those whose attacks take longer to compile than a run has time for.
QUICK_ROWS = tuple(ROWS)[: tuple(ROWS).index("adversarial") + 1]


def choose(points: Hyperparameters, score: Array, belongs) -> Hyperparameters:
    """The point of the highest score among those that belong to a row, as scalars."""
    best = int(np.where(belongs(points), np.nan_to_num(np.asarray(score), nan=-1.0), -1.0).argmax())
    return jax.tree.map(lambda values: jnp.float32(values[best]), points)
