"""A run of inner steps as one `jax.lax.scan`, for any optax optimizer."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import Partial
from jax.typing import ArrayLike

from advmeta.attacks.validation import check_arrays, check_attack_inputs
from advmeta.inner_gradients import (
    CONSTANT,
    InnerGradient,
    StatefulGradient,
    attacked,
    clean,
    stateful,
)
from advmeta.task_families import TaskFamily
from advmeta.tasks import Task
from advmeta.types import Array, Batch, Key, Params, PyTree

Evaluate = Callable[[Params, Key], PyTree]


class InnerState(NamedTuple):
    """What the next inner step needs."""

    params: Params
    opt_state: PyTree
    step: Array  # [] int32: inner steps since the start of the episode
    gradient_state: PyTree = ()  # of the inner gradient, where it remembers anything


class Trajectory(NamedTuple):
    """What a person needs of each inner step, stacked by the scan: [steps, ...]."""

    loss: Array  # the loss whose gradient was taken, before the update
    gradient_norm: Array  # global l2 norm of that gradient
    evaluation: PyTree  # what `evaluate` gave, [steps / every]; None without it


def init_inner(
    task: Task,
    optimizer: optax.GradientTransformation,
    key: Key,
    inner_gradient: InnerGradient = clean,
) -> InnerState:
    """Fresh parameters, and fresh states of the optimizer and the inner gradient.

    Raises:
      ValueError: the task's examples are outside of the threat model's bounds, or their labels or
        shapes do not fit the model.
    """
    x, _ = check_arrays(*task.train)
    params = task.optimizee.init(key, x.shape[1:])
    params = jax.tree.map(lambda p: _scale(p, task.initial_scale) if p.ndim > 1 else p, params)
    for part in (task.train, task.held_out):
        check_attack_inputs(Partial(task.optimizee.apply, params), *part, task.threat_model)
    gradient_state = stateful(inner_gradient).init(task)
    return InnerState(params, optimizer.init(params), jnp.zeros([], jnp.int32), gradient_state)


def _scale(p: Array, factor: ArrayLike) -> Array:
    return (p * factor).astype(p.dtype)


def unroll(
    task: Task,
    optimizer: optax.GradientTransformation,
    state: InnerState,
    key: Key,
    *,
    steps: int,
    inner_gradient: InnerGradient = clean,
    evaluate: Evaluate | None = None,
    every: int = 1,
    recompute: Literal["step", "nothing"] = "step",
) -> tuple[InnerState, Trajectory]:
    """Takes inner steps: gradient, update, apply.

    ``l_t, g_t = inner_gradient(theta_t)``,
    ``u_t, s_{t+1} = optimizer.update(g_t, s_t, theta_t, value=l_t)``,
    ``theta_{t+1} = theta_t + u_t``

    Step t draws from ``fold_in(key, t)`` with t counted from the start of the episode: an episode
    cut in pieces is the same as in one piece.

    Args:
      task: data and model.
      optimizer: any optax optimizer; the meta-optimizer is one.
      state: from `init_inner`, or what an earlier unroll returned.
      key: of the episode.
      steps: inner steps to take.
      inner_gradient: one of `advmeta.inner_gradients`.
      evaluate: (params, key) -> anything, called after the last update of every few.
      every: how many these are; it divides ``steps``.
      recompute: what a backward pass through the unroll computes once more in the place of storing
        it: each "step", and what ``evaluate`` does, or "nothing".

    Returns:
      The state after the last step, and the `Trajectory`.

    Raises:
      ValueError: ``every`` does not divide ``steps``; the inner gradient remembers something, and
        the state was made for another one.

    Example:
      >>> digits = advmeta.data.load("digits")
      >>> task = Task(digits.train, digits.test, advmeta.ThreatModel(), advmeta.optimizees.mlp())
      >>> optimizer = optax.adam(1e-2)
      >>> state = init_inner(task, optimizer, jax.random.key(0))
      >>> state, trajectory = unroll(task, optimizer, state, jax.random.key(1), steps=100)
      >>> bool(trajectory.loss[-10:].mean() < 0.5 * trajectory.loss[0])
      True
    """
    inner_gradient, optimizer = stateful(inner_gradient), optax.with_extra_args_support(optimizer)
    _check_gradient_state(task, inner_gradient, state)
    if steps % every:
        raise ValueError(f"every={every} must divide steps={steps}")

    def step(state: InnerState, gradient_key: Key):
        loss, gradient, gradient_state = inner_gradient.apply(
            task, state.params, gradient_key, state.gradient_state
        )
        loss, gradient = checkpoint_name((loss, gradient), CONSTANT)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradient)
        return InnerState(params, opt_state, state.step + 1, gradient_state), (loss, norm)

    # On two CPU cores, recomputing a step is faster than storing what the LSTM did in it: the
    # activations of a truncation are bound by memory. What nothing differentiates through, the
    # inner gradient and the attacked examples, is small and costs many passes: it is stored.
    keep = jax.checkpoint_policies.save_only_these_names(CONSTANT)
    if recompute == "nothing":
        keep = jax.checkpoint_policies.everything_saveable
    # All keys at once: hashing them one by one is a good part of what the loop would do.
    step_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(state.step + jnp.arange(steps))
    step_keys = jax.vmap(jax.random.split)(step_keys).reshape(steps // every, every, 2)

    def steps_and_look(state: InnerState, keys: Key):
        state, infos = jax.lax.scan(jax.checkpoint(step, policy=keep), state, keys[:, 0])
        look = jax.checkpoint(evaluate, policy=keep) if evaluate else lambda params, key: None
        return state, (infos, look(state.params, keys[-1, 1]))

    state, (infos, evaluation) = jax.lax.scan(steps_and_look, state, step_keys)
    loss, norm = (info.reshape(steps) for info in infos)
    return state, Trajectory(loss, norm, evaluation)


def _check_gradient_state(task: Task, inner_gradient: StatefulGradient, state: InnerState) -> None:
    expected = jax.tree.structure(jax.eval_shape(inner_gradient.init, task))
    found = jax.tree.structure(state.gradient_state)
    if found != expected:
        raise ValueError(
            f"the state's gradient_state is a {found}, and this inner gradient remembers a "
            f"{expected}: start from init_inner(task, optimizer, key, inner_gradient)"
        )


def train(
    task: Task,
    optimizer: optax.GradientTransformation,
    key: Key,
    *,
    steps: int,
    inner_gradient: InnerGradient = clean,
    evaluate: Evaluate | None = None,
) -> tuple[Params, Trajectory]:
    """A whole episode, from fresh parameters; arguments as in `unroll`."""
    init_key, episode_key = jax.random.split(key)
    state = init_inner(task, optimizer, init_key, inner_gradient)
    state, trajectory = unroll(
        task, optimizer, state, episode_key,
        steps=steps, inner_gradient=inner_gradient, evaluate=evaluate,
    )  # fmt: skip
    return state.params, trajectory


@jax.jit(static_argnames=("steps", "attack_steps"))
def with_replay(
    task: Task | TaskFamily, key: Key, *, steps: int = 200, attack_steps: int = 7
) -> Task | TaskFamily:
    """Adds adversarial examples made once, on a source model that Adam trains on the same data.

    Args:
      task: a task, or a family: then the examples are made for its whole pool.
      key: for the source model's parameters and batches, and the attack.
      steps: inner steps of the source model, with ``optax.adam(1e-2)``.
      attack_steps: steps of PGD.
    """
    examples: Batch = task.pool if isinstance(task, TaskFamily) else task.train
    source = Task(examples, examples, task.threat_model, task.optimizee, task.batch_size)
    train_key, attack_key = jax.random.split(key)
    params, _ = train(source, optax.adam(1e-2), train_key, steps=steps)
    moved = attacked(source, params, examples, attack_key, attack_steps)
    return dataclasses.replace(task, replay=moved.x)
