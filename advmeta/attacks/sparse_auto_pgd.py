"""Auto-PGD in l1 (Croce and Hein 2021): sparse steps, and a ball that shrinks to epsilon.

Follows the reference implementation, fra31/auto-attack, with the settings of its standard version.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advmeta.attacks import l1_ball
from advmeta.attacks.batching import choose, wide
from advmeta.attacks.runs import Evaluation, keep_best
from advmeta.attacks.threat_model import ThreatModel
from advmeta.attacks.validation import AttackResult
from advmeta.types import Array

SPARSER = 1.5  # the next steps have so many times fewer entries than the best perturbation
SHORTER = 1.5  # a step that did not make the best point sparser is divided by this ...
SHORTEST = 0.1  # ... down to this share of the radius
FELL = 0.95  # the best point has become sparser where it keeps less than this share of its entries


class Schedule(NamedTuple):
    """What each evaluation of a run is, all [steps + 1]."""

    factor: Array  # the radius of the ball that the point is in, in units of epsilon
    is_start: Array  # the first point in that ball
    is_checkpoint: Array


def phases(steps: int) -> Schedule:
    """30 % of a run in the ball of radius 3 epsilon, 30 % in that of 2 epsilon, then epsilon.

    The reference evaluates the start of each phase on top of ``steps``. Here the starts of the
    second and third are among them, so that a run costs what it does in the other norms.
    """
    large = 3 * steps // 10
    lengths = np.array([large, large, steps + 1 - 2 * large])
    factor = np.repeat(np.array([3, 2, 1], np.float32), lengths)
    age = np.concatenate([np.arange(length) for length in lengths])
    # A phase of n steps has checkpoints 0.04 n apart: at every step, in runs of 100.
    period = np.repeat(np.maximum((0.04 * (lengths - [0, 0, 1])).astype(int), 1), lengths)
    is_checkpoint = (age > 0) & (age % period == 0)
    return Schedule(*map(jnp.asarray, (factor, age == 0, is_checkpoint)))


class _State(NamedTuple):
    x: Array  # the point to evaluate next
    best: Array  # the point of the highest loss in this phase, with that loss and its gradient
    best_loss: Array
    best_gradient: Array
    x_adv: Array  # the last misclassified point of this phase
    is_adversarial: Array
    step_size: Array  # [n], in units of the phase's radius
    entries: Array  # [n]: how many coordinates the best point had moved, at the last checkpoint


def climb(threat_model: ThreatModel, x: Array, schedule: Schedule, evaluate, start) -> AttackResult:
    """One run, as `attack_in_runs` takes it. Only the last phase's points count.

    ``x_{t+1} = P(x_t + eta_t s_t)``, s_t the signs of the largest entries of the gradient, over
    their number: as many as the best point has moved coordinates, divided by 1.5.
    """

    def ball(factor):
        radius = factor * jnp.asarray(threat_model.epsilon, x.dtype)
        return dataclasses.replace(threat_model, epsilon=radius)

    def turn(state: _State, inputs):
        i, now, coming = inputs
        begun = _begin(state, x)
        state = jax.tree.map(lambda a, b: jnp.where(now.is_start, a, b), begun, state)
        at = evaluate(state.x, i)
        state = keep_best(state, at)
        state, x_now, gradient = _checkpoint(state, at, now.is_checkpoint, x)
        share = state.entries / x[0].size / SPARSER
        length = wide(state.step_size, x) * ball(now.factor).radius(x)
        moved = x_now + length * l1_ball.sparse_sign(gradient, share)
        # The next phase begins at the best point of this one. The last move is not used.
        x_next = jnp.where(coming.is_start, state.best, moved)
        return state._replace(x=ball(coming.factor).project(x_next, x)), None

    start = ball(schedule.factor[0]).project(start, x)
    n = x.shape[0]
    zero, nothing = jnp.zeros(n, x.dtype), jnp.zeros_like(x)
    state = _State(start, start, zero, nothing, start, jnp.zeros(n, bool), zero, zero)
    coming = jax.tree.map(lambda a: jnp.concatenate([a[1:], a[-1:]]), schedule)
    turns = jnp.arange(schedule.factor.shape[0])
    state, _ = jax.lax.scan(turn, state, (turns, schedule, coming))
    x_adv = choose(state.is_adversarial, state.x_adv, state.best)
    return AttackResult(x_adv, state.is_adversarial, state.best_loss)


def _begin(state: _State, x: Array) -> _State:
    """Forgets the phase before, but for the point where this one starts."""
    return state._replace(
        best=state.x,
        best_loss=jnp.full_like(state.best_loss, -jnp.inf),
        x_adv=state.x,
        is_adversarial=jnp.zeros_like(state.is_adversarial),
        step_size=jnp.ones_like(state.step_size),
        entries=_entries(state.x, x),
    )


def _checkpoint(
    state: _State, at: Evaluation, is_checkpoint, x: Array
) -> tuple[_State, Array, Array]:
    """Goes back to the best point with a full step where it became sparser, else halves or so."""
    entries = _entries(state.best, x)
    is_sparser = entries < FELL * state.entries
    step_size = jnp.maximum(jnp.where(is_sparser, 1.0, state.step_size / SHORTER), SHORTEST)
    state = state._replace(
        step_size=jnp.where(is_checkpoint, step_size, state.step_size),
        entries=jnp.where(is_checkpoint, entries, state.entries),
    )
    back = is_checkpoint & is_sparser
    return (
        state,
        choose(back, state.best, state.x),
        choose(back, state.best_gradient, at.gradient),
    )


def _entries(x_t: Array, x: Array) -> Array:
    """How many coordinates differ, [n]."""
    return (x_t != x).reshape(x.shape[0], -1).sum(axis=1).astype(x.dtype)
