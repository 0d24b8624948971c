"""MultiTargeted (Gowal et al. 2019): PGD towards every other class in turn."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advmeta.attacks.auto_pgd import random_start
from advmeta.attacks.projected_gradient import better
from advmeta.attacks.runs import attack_in_runs, prepare
from advmeta.attacks.threat_model import ThreatModel, example_keys
from advmeta.attacks.validation import AttackResult
from advmeta.types import Array, Key, LogitsFn


def multi_targeted(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    threat_model: ThreatModel,
    key: Key,
    target_ranks: Sequence[int] | None = None,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    x_init: Array | None = None,
    eot_samples: int | None = None,
) -> AttackResult:
    """PGD on the difference of two logits, for one target class after the other.

    ``x_{t+1} = P( x_t + step_size * steepest( grad_x (z_k(x_t) - z_y(x_t)) ) ),  k != y``

    with P the projection onto the ball and the bounds. On a model that is linear within the ball
    each of these is a linear programme, so that one of them finds an adversarial example wherever
    there is one. Targets come in the order of the clean logits, strongest first; examples that are
    broken are left out of the later ones. The authors' code takes Adam steps; these are steepest
    ascent, which is exact on linear models for linf and l2.

    It is always untargeted: to reach one given class use ``apgd(targeted=True)``.

    Args:
      logits_fn: x [n, ...] -> logits [n, k]; (x, key) -> logits if eot_samples is given.
      x: examples [n, ...], in the threat model's bounds.
      y: true labels [n].
      threat_model: the ball; its epsilon may be [n].
      key: for the random starts, one an example, restart and target.
      target_ranks: which classes; by default all, ``range(2, k + 1)``; rank 1 is the predicted one.
      steps: gradient steps a run.
      step_size: in the units of x; by default it falls linearly from 2 epsilon to 0.
      restarts: random starts for each target, at distance epsilon.
      x_init: start here [n, ...] in the first restart instead of at random.
      eot_samples: see `apgd`.

    Returns:
      `AttackResult`. x_adv is the best point on the path, misclassified before not, then of the
      highest loss, which is ``z_k - z_y`` for the target k it was found with.

    Raises:
      ValueError: labels that do not fit, images out of bounds or NaN, ranks below 2, steps,
        restarts or eot_samples below 1.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x[:, 0], x[:, 1]], axis=1)
      >>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
      >>> result = advmeta.attacks.multi_targeted(
      ...     logits_fn, x, y, threat_model=advmeta.ThreatModel("linf", epsilon=0.1),
      ...     key=jax.random.key(0))
      >>> result.is_adversarial.tolist()  # the margins are 0.1 and 0.8; 0.2 is the most it can move
      [True, False]

    Reference:
      Gowal et al. 2019, An Alternative Surrogate Loss for PGD-based Adversarial Testing, algorithm
      1. arXiv:1910.09338
    """
    prepared = prepare(
        logits_fn, x, y, threat_model, key, loss="margin",
        target_ranks="all" if target_ranks is None else target_ranks, x_init=x_init,
        targeted=False, eot_samples=eot_samples, steps=steps, restarts=restarts,
    )  # fmt: skip
    logits_fn, x, y, x_init, ranks, loss, note = prepared
    result = _multi_targeted(
        logits_fn, x, y, threat_model, key, ranks, x_init, step_size,
        steps=steps, restarts=restarts, loss=loss, eot_samples=eot_samples,
    )  # fmt: skip
    return result._replace(note=note)


@jax.jit(static_argnames=("steps", "restarts", "loss", "eot_samples"))
def _multi_targeted(
    logits_fn: Partial, x, y, threat_model, key, target_ranks, x_init, step_size,
    *, steps, restarts, loss, eot_samples,
) -> AttackResult:  # fmt: skip
    if step_size is None:
        # Gowal et al. find decaying steps the best. From 2 epsilon a run forgets where it started.
        decay = (1 - jnp.arange(steps + 1) / steps).astype(x.dtype)
        step_sizes = 2 * threat_model.radius(x) * decay.reshape((-1,) + (1,) * x.ndim)
    else:
        constant = ThreatModel(epsilon=step_size).radius(x)
        step_sizes = jnp.broadcast_to(constant, (steps + 1, *constant.shape))
    return attack_in_runs(
        functools.partial(_climb, threat_model, x, step_sizes),
        lambda keys: random_start(threat_model, keys, x),
        logits_fn, x, y, example_keys(key, x), target_ranks, x_init,
        restarts=restarts, targeted=False, loss=loss, eot_samples=eot_samples,
    )  # fmt: skip


def _climb(threat_model, x, step_sizes, evaluate, start) -> AttackResult:
    """One run. Each turn of the scan evaluates a point, then moves; the last move is not used."""

    def turn(carry, inputs):
        (x_t, best), (i, step_size) = carry, inputs
        at = evaluate(x_t, i)
        best = better(AttackResult(x_t, at.is_adversarial, at.loss), best)
        x_next = threat_model.project(x_t + step_size * threat_model.steepest(at.gradient), x)
        return (x_next, best), None

    n, turns = x.shape[0], step_sizes.shape[0]
    worst = AttackResult(start, jnp.zeros(n, bool), jnp.full(n, -jnp.inf, x.dtype))
    (_, best), _ = jax.lax.scan(turn, (start, worst), (jnp.arange(turns), step_sizes))
    return best
