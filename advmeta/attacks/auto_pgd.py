"""Auto-PGD (Croce and Hein 2020): projected gradient ascent that sets its own step size.

Follows the reference implementation, fra31/auto-attack, where it departs from the paper; each such
place says so.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from advmeta.attacks import sparse_auto_pgd
from advmeta.attacks.batching import choose, wide
from advmeta.attacks.runs import Evaluation, attack_in_runs, keep_best, prepare
from advmeta.attacks.threat_model import ThreatModel, example_keys
from advmeta.attacks.validation import AttackResult
from advmeta.types import Array, Key, LogitsFn

MOMENTUM = 0.75  # the weight of the new step, alpha in algorithm 1; 1 in the first iteration


def apgd(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    threat_model: ThreatModel,
    key: Key,
    loss: str | Callable = "ce",
    target_ranks: Sequence[int] | None = None,
    steps: int = 100,
    restarts: int = 1,
    targeted: bool = False,
    x_init: Array | None = None,
    eot_samples: int | None = None,
    rho: float = 0.75,
) -> AttackResult:
    """Gradient ascent with momentum whose step halves, from the best point, when progress stalls.

    ``z_t = P(x_t + eta_t steepest(g_t)), x_{t+1} = P(x_t + a (z_t - x_t) + (1-a) (x_t - x_{t-1}))``

    with g_t the gradient of the loss, P the projection onto the ball and the bounds, a = 0.75 and
    eta_0 = 2 epsilon. At checkpoints after 22, 41, 57, 70, 80, 87, 93 and 99 % of the steps, eta is
    halved where at most ``rho`` of the steps since the last one raised the loss, or where neither
    the step nor the best loss changed between the last two.

    In l1 there is no momentum, and the steps are sparse: s is the sign of the gradient's largest
    entries, over their number, which falls as the best point gets sparser, and eta runs from
    epsilon to epsilon / 10. The run goes through balls of radius 3, 2 and 1 epsilon, and only the
    points of the last one count: `sparse_auto_pgd`.

    With ``target_ranks`` each rank is a run of its own towards the class that has that rank in the
    clean logits (APGD-T for ``loss="dlr"``); success is misclassification as anything. Examples
    that a run has broken are left out of the later ones, and runs end when no example is left.

    Args:
      logits_fn: x [n, ...] -> logits [n, k]; (x, key) -> logits if eot_samples is given.
      x: examples [n, ...], in the threat model's bounds.
      y: true labels [n], or the labels to reach if targeted.
      threat_model: the ball; its epsilon may be [n].
      key: for the random starts, one an example, restart and target.
      loss: "ce", "dlr" or "margin", or a function (logits, y) -> [n], with target_ranks a function
        (logits, y, target) -> [n]; raised.
      target_ranks: e.g. ``range(2, 11)``; rank 1 is the predicted class. Other ranks, as many,
        need no second compilation.
      steps: gradient steps a run; each costs one forward and backward pass, as does the start.
      restarts: runs from other random points, for each target.
      targeted: lower the loss of the labels y until they are predicted.
      x_init: start here [n, ...] in the first restart instead of at random.
      eot_samples: for randomized models, average the gradient over so many draws of the model's
        key. As in the reference, the last draw alone decides about loss and success.
      rho: the share of steps that must raise the loss; of no use in l1.

    Returns:
      `AttackResult`. x_adv is the last misclassified iterate, as in the reference, or else the one
      of the highest loss; ``loss`` is the highest of the path, whether x_adv has it or not.
      ``note`` tells when the model has too few classes for the DLR, or for the ranks.

    Raises:
      ValueError: labels that do not fit, images out of bounds or NaN, an unknown loss, ranks
        together with targeted, steps, restarts or eot_samples below 1.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x[:, 0], x[:, 1]], axis=1)
      >>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
      >>> result = advmeta.attacks.apgd(logits_fn, x, y, key=jax.random.key(0), loss="dlr",
      ...                               threat_model=advmeta.ThreatModel("linf", epsilon=0.1))
      >>> result.is_adversarial.tolist()  # the margins are 0.1 and 0.8; 0.2 is the most it can move
      [True, False]
      >>> print(result.note)
      the DLR loss needs 3 classes and the model has 2: used the margin loss instead

    Reference:
      Croce and Hein 2020, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
      Parameter-free Attacks, algorithm 1. arXiv:2003.01690; for l1 Croce and Hein 2021, Mind the
      Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers, algorithm 1.
      arXiv:2103.01208
    """
    prepared = prepare(
        logits_fn, x, y, threat_model, key, loss=loss, target_ranks=target_ranks, x_init=x_init,
        targeted=targeted, eot_samples=eot_samples, steps=steps, restarts=restarts,
    )  # fmt: skip
    logits_fn, x, y, x_init, ranks, loss, note = prepared
    result = _apgd(
        logits_fn, x, y, threat_model, key, ranks, x_init, rho,
        steps=steps, restarts=restarts, targeted=targeted, loss=loss, eot_samples=eot_samples,
    )  # fmt: skip
    return result._replace(note=note)


class Schedule(NamedTuple):
    """Which evaluations are checkpoints, and how many steps lie behind each; both [steps + 1]."""

    is_checkpoint: Array
    window: Array


def checkpoints(steps: int) -> Schedule:
    """The checkpoints of a run; entry 0 is the start, which is none."""
    window = max(int(0.22 * steps), 1)
    decrement, smallest = max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)
    is_checkpoint, windows = np.zeros(steps + 1, bool), np.zeros(steps + 1, np.int32)
    i = window
    while i <= steps:
        is_checkpoint[i], windows[i] = True, window
        window = max(window - decrement, smallest)
        i += window
    return Schedule(jnp.asarray(is_checkpoint), jnp.asarray(windows))


class _State(NamedTuple):
    x: Array  # the point to evaluate next
    x_previous: Array
    step_size: Array  # [n, 1, ...]
    best: Array  # the point of the highest loss so far, with that loss and its gradient
    best_loss: Array
    best_gradient: Array
    x_adv: Array  # the last misclassified point
    is_adversarial: Array
    last_loss: Array
    increases: Array  # [n] int32: steps that raised the loss since the last checkpoint
    checkpoint_loss: Array  # the best loss at the last checkpoint
    was_reduced: Array  # [n] bool: at the last checkpoint


@jax.jit(static_argnames=("steps", "restarts", "targeted", "loss", "eot_samples"))
def _apgd(
    logits_fn: Partial, x, y, threat_model, key, target_ranks, x_init, rho,
    *, steps, restarts, targeted, loss, eot_samples,
) -> AttackResult:  # fmt: skip
    if threat_model.norm == "l1":
        climb = functools.partial(
            sparse_auto_pgd.climb, threat_model, x, sparse_auto_pgd.phases(steps)
        )
        start = functools.partial(_normal_start, x)
    else:
        climb = functools.partial(_climb, threat_model, x, checkpoints(steps), rho)
        start = functools.partial(random_start, threat_model, x=x)
    return attack_in_runs(
        climb, start,
        logits_fn, x, y, example_keys(key, x), target_ranks, x_init,
        restarts=restarts, targeted=targeted, loss=loss, eot_samples=eot_samples,
    )  # fmt: skip


def random_start(threat_model: ThreatModel, keys: Key, x: Array) -> Array:
    """The reference's start, on the sphere: noise scaled, an example, to the norm epsilon."""
    draw = _uniform if threat_model.norm == "linf" else jax.random.normal
    noise = jax.vmap(lambda k: draw(k, x.shape[1:], x.dtype))(keys)
    norm = threat_model.distance(jnp.zeros_like(x), noise)
    return jnp.clip(
        x + threat_model.radius(x) * noise / wide(norm + 1e-12, x), *threat_model.bounds
    )


def _normal_start(x: Array, keys: Key) -> Array:
    """The start of l1, which the run projects onto its first ball: that leaves few entries."""
    return x + jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)


def _uniform(key: Key, shape: tuple[int, ...], dtype) -> Array:
    return jax.random.uniform(key, shape, dtype, -1, 1)


def _climb(threat_model, x, schedule: Schedule, rho, evaluate, start) -> AttackResult:
    """One run. Each turn of the scan evaluates a point, then moves; the last move is not used.

    So there is one copy of the model in the compiled program, and no pass is made twice.
    """
    n = x.shape[0]

    def turn(state: _State, inputs):
        i, is_checkpoint, window = inputs
        at = evaluate(state.x, i)
        state = _record(state, at, i == 0)
        state, x_now, gradient = _checkpoint(state, at, is_checkpoint, window * rho)
        a = jnp.where(i == 0, 1.0, MOMENTUM).astype(x.dtype)
        z = threat_model.project(x_now + state.step_size * threat_model.steepest(gradient), x)
        # After a checkpoint x_now may be the best point; x_previous is the last iterate all the
        # same, so the momentum then points from it to the best one (the reference does so too).
        x_next = threat_model.project(
            x_now + a * (z - x_now) + (1 - a) * (x_now - state.x_previous), x
        )
        return state._replace(x=x_next, x_previous=x_now), None

    radius = jnp.broadcast_to(threat_model.radius(x), (n,) + (1,) * (x.ndim - 1))
    lowest, zero = jnp.full(n, -jnp.inf, x.dtype), jnp.zeros(n, x.dtype)
    state = _State(
        start, start, 2 * radius, start, lowest, jnp.zeros_like(x), start, jnp.zeros(n, bool),
        zero, jnp.zeros(n, jnp.int32), lowest, jnp.ones(n, bool),
    )  # fmt: skip
    turns = schedule.is_checkpoint.shape[0]
    state, _ = jax.lax.scan(turn, state, (jnp.arange(turns), *schedule))
    x_adv = choose(state.is_adversarial, state.x_adv, state.best)
    return AttackResult(x_adv, state.is_adversarial, state.best_loss)


def _record(state: _State, at: Evaluation, is_start) -> _State:
    """Takes in what the model said about the point ``state.x``."""
    state = keep_best(state, at)
    return state._replace(
        # A quirk of the reference: the first step is compared not with the start's loss but with
        # 0, a row of the table of losses that is not filled yet.
        last_loss=jnp.where(is_start, 0.0, at.loss),
        increases=state.increases + (~is_start & (at.loss > state.last_loss)),
        checkpoint_loss=jnp.where(is_start, state.best_loss, state.checkpoint_loss),
    )


def _checkpoint(
    state: _State, at: Evaluation, is_checkpoint, needed
) -> tuple[_State, Array, Array]:
    """Halves the step and goes back to the best point where progress has stalled."""
    # At most, where the paper's condition 1 says less than: the reference's comparison.
    oscillates = state.increases <= needed
    # The flag starts as true, so this cannot hold at the first checkpoint.
    stands_still = ~state.was_reduced & (state.checkpoint_loss >= state.best_loss)
    reduce = is_checkpoint & (oscillates | stands_still)
    wide = reduce.reshape(state.step_size.shape)
    state = state._replace(
        step_size=jnp.where(wide, state.step_size / 2, state.step_size),
        increases=jnp.where(is_checkpoint, 0, state.increases),
        checkpoint_loss=jnp.where(is_checkpoint, state.best_loss, state.checkpoint_loss),
        was_reduced=jnp.where(is_checkpoint, reduce, state.was_reduced),
    )
    return (
        state,
        choose(reduce, state.best, state.x),
        choose(reduce, state.best_gradient, at.gradient),
    )
