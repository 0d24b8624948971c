"""Gradient attacks that make several runs, over target classes and random starts.

`prepare` checks the options they have in common, `attack_in_runs` is the loop over the runs, and
`Evaluation` is what a run learns about a point from one forward and backward pass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advmeta.attacks import losses
from advmeta.attacks.batching import choose, fold
from advmeta.attacks.projected_gradient import better
from advmeta.attacks.randomized import with_keys
from advmeta.attacks.threat_model import ThreatModel
from advmeta.attacks.validation import AttackResult, Note, as_partial, check_attack_inputs
from advmeta.types import Array, Key, LogitsFn


class Prepared(NamedTuple):
    """Checked arguments of an attack."""

    logits_fn: Partial
    x: Array
    y: Array
    x_init: Array | None
    target_ranks: Array | None
    loss: Callable
    note: Note


def prepare(
    logits_fn: LogitsFn, x, y, threat_model: ThreatModel, key: Key, *, loss: str | Callable,
    target_ranks: Sequence[int] | Literal["all"] | None, x_init, targeted: bool,
    eot_samples: int | None, **counts,
) -> Prepared:  # fmt: skip
    """Checks what a call passes, or raises a ValueError; ``counts`` must be 1 at least."""
    if eot_samples is not None:
        counts["eot_samples"] = eot_samples
    check_counts(**counts)
    if targeted and target_ranks is not None:
        raise ValueError(
            "targeted=True takes the labels to reach from y; target_ranks takes them from the "
            "model's own ranking and leaves y the true labels: give one of the two"
        )
    logits_fn = as_partial(logits_fn)
    one_draw = logits_fn if eot_samples is None else Partial(_with_one_key, logits_fn, key)
    x, y = check_attack_inputs(one_draw, x, y, threat_model)
    x_init = check_start(x_init, x)
    classes = jax.eval_shape(one_draw, x).shape[1]
    loss, note = losses.resolve(loss, classes, towards_a_class=target_ranks is not None)
    ranks = None
    if target_ranks is not None:
        every = range(2, classes + 1)
        kept, rank_note = losses.check_ranks(
            every if target_ranks == "all" else target_ranks, classes
        )
        ranks = jnp.array(kept)
        note = Note("; ".join(filter(None, [note, rank_note])))
    return Prepared(logits_fn, x, y, x_init, ranks, loss, note)


def check_counts(**counts) -> None:
    """Raises a ValueError unless every number is 1 at least."""
    if min(counts.values()) < 1:
        written = ", ".join(f"{name}={value}" for name, value in counts.items())
        raise ValueError(f"{written}: each must be at least 1")


def check_start(x_init, x: Array) -> Array | None:
    """x_init in x's dtype; raises a ValueError where it has another shape."""
    if x_init is None:
        return None
    if jnp.shape(x_init) != x.shape:
        raise ValueError(f"x_init has shape {jnp.shape(x_init)}; it must be x's, {x.shape}")
    return jnp.asarray(x_init, x.dtype)


def _with_one_key(logits_fn: Partial, key: Key, x: Array) -> Array:
    return with_keys(logits_fn, jnp.broadcast_to(key, x.shape[:1]), x)


class Evaluation(NamedTuple):
    """What the model says about a point."""

    loss: Array  # [n], to be raised
    gradient: Array  # [n, ...]
    is_adversarial: Array  # [n] bool


def attack_in_runs(
    climb: Callable, random_start: Callable, logits_fn: Partial, x: Array, y: Array, keys: Key,
    target_ranks: Array | None, x_init: Array | None,
    *, restarts: int, targeted: bool, loss: Callable, eot_samples: int | None,
) -> AttackResult:  # fmt: skip
    """Runs for each target rank and restart until every example is broken; traced.

    Args:
      climb: (evaluate, start [n, ...]) -> AttackResult, one run, where evaluate is
        (x [n, ...], i) -> `Evaluation` at the i-th point of the path.
      random_start: keys [n] -> [n, ...].
      logits_fn, x, y, target_ranks, x_init: see `prepare`.
      keys: one an example.
      restarts, targeted, loss, eot_samples: see `advmeta.attacks.apgd`.
    """
    ranks, clean_logits = jnp.zeros(1, jnp.int32), None
    if target_ranks is not None:
        ranks = target_ranks
        # Its own branch of the keys: the runs fold in 0, 1, ...
        clean_keys = fold(keys, jnp.uint32(2**31))
        clean_logits = logits_fn(x) if eot_samples is None else with_keys(logits_fn, clean_keys, x)

    def run(carry):
        index, result = carry
        run_keys = fold(keys, index)
        if x_init is not None and restarts == 1:
            start = x_init
        else:
            start = random_start(run_keys if eot_samples is None else fold(run_keys, 0))
            if x_init is not None:
                start = jnp.where(index % restarts == 0, x_init, start)
        if clean_logits is None:
            sign = -1.0 if targeted else 1.0
            objective = partial(_plain, loss, sign, y)
        else:
            target = losses.target_of_rank(clean_logits, ranks[index // restarts])
            objective = partial(_towards, loss, target, y)
        evaluate = _evaluator(logits_fn, objective, y, targeted, eot_samples, run_keys)
        return index + 1, keep_first(result, climb(evaluate, start))

    n, runs = x.shape[0], ranks.shape[0] * restarts
    nothing = AttackResult(x, jnp.zeros(n, bool), jnp.full(n, -jnp.inf, x.dtype))
    _, result = jax.lax.while_loop(
        lambda carry: (carry[0] < runs) & ~carry[1].is_adversarial.all(), run, (0, nothing)
    )
    return result._replace(loss=-result.loss if targeted else result.loss)


def keep_first(earlier: AttackResult, later: AttackResult) -> AttackResult:
    """The earlier result where it is adversarial, else the stronger of the two."""
    ignored = later._replace(
        is_adversarial=later.is_adversarial & ~earlier.is_adversarial,
        loss=jnp.where(earlier.is_adversarial, -jnp.inf, later.loss),
    )
    return better(ignored, earlier)


def keep_best(state, at: Evaluation):
    """Takes in what the model said about the point ``state.x`` of a path.

    Args:
      state: a NamedTuple with x, best, best_loss, best_gradient (the point of the highest loss),
        x_adv (the last misclassified point) and is_adversarial (whether there is one).
      at: the evaluation of x.
    """
    is_best = at.loss > state.best_loss
    return state._replace(
        best=choose(is_best, state.x, state.best),
        best_loss=jnp.where(is_best, at.loss, state.best_loss),
        best_gradient=choose(is_best, at.gradient, state.best_gradient),
        x_adv=choose(at.is_adversarial, state.x, state.x_adv),
        is_adversarial=at.is_adversarial | state.is_adversarial,
    )


def _plain(loss, sign, y, logits):
    return sign * loss(logits, y)


def _towards(loss, target, y, logits):
    return loss(logits, y, target)


def _evaluator(logits_fn, objective, y, targeted, eot_samples, keys) -> Callable:
    """(x, i) -> `Evaluation`: one forward and one backward pass a draw of the model's key."""

    def once(model, x):
        def total(x):
            logits = model(x)
            loss = objective(logits)
            return loss.sum(), (loss, losses.is_right(logits, y) == targeted)

        gradient, (loss, is_adversarial) = jax.grad(total, has_aux=True)(x)
        return Evaluation(loss, gradient, is_adversarial)

    def deterministic(x, i):
        del i
        return once(logits_fn, x)

    def averaged(x, i):
        point_keys = fold(keys, 1 + i)

        def draw(before, sample):
            drawn = once(lambda x: with_keys(logits_fn, fold(point_keys, sample), x), x)
            # The gradients add up; loss and success are those of the last draw, as in the
            # reference.
            return drawn._replace(gradient=before.gradient + drawn.gradient), None

        n = x.shape[0]
        nothing = Evaluation(jnp.zeros(n, x.dtype), jnp.zeros_like(x), jnp.zeros(n, bool))
        last, _ = jax.lax.scan(draw, nothing, jnp.arange(eot_samples))
        return last._replace(gradient=last.gradient / eot_samples)

    return deterministic if eot_samples is None else averaged
