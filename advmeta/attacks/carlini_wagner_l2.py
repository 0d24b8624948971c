"""The Carlini-Wagner l2 attack (2017): the nearest adversarial example, by a penalty method.

Follows the authors' code, carlini/nn_robust_attacks, with two differences. An example stops when
its own loss stands still, not when that of the whole batch does, so the batch does not matter. And
a c counts as large enough only if points are adversarial in the last tenth of its steps: Adam's
first step has the length of the learning rate whatever c is, so near a boundary every c would pass.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from advmeta.attacks import losses
from advmeta.attacks.auto_pgd import random_start
from advmeta.attacks.batching import choose, fold
from advmeta.attacks.minimum_norm import Found, hand_out, nothing_yet
from advmeta.attacks.runs import check_counts, check_start
from advmeta.attacks.threat_model import ThreatModel, example_keys
from advmeta.attacks.validation import AttackResult, as_partial, check_attack_inputs
from advmeta.types import Array, Key, LogitsFn

LARGEST_CONST = 1e10  # c stays below
# A bound is reached at w = +-inf only; the authors shrink by this before they take atanh.
INTERIOR = 0.999999
STILL = 0.9999  # a loss above this share of the one a tenth of the steps ago stands still


def carlini_wagner(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    threat_model: ThreatModel,
    key: Key,
    steps: int = 1000,
    learning_rate: float = 0.01,
    binary_search_steps: int = 9,
    initial_const: float = 1e-3,
    confidence: float = 0.0,
    abort_early: bool = True,
    restarts: int = 1,
    targeted: bool = False,
    x_init: Array | None = None,
) -> AttackResult:
    """Minimises the distance plus c times the margin that is left, and searches for the c.

    ``min_w ||x'(w) - x||_2^2 + c max(0, z_y - max_{i != y} z_i + confidence)``

    with ``x'(w) = middle + half_width tanh(w)``, which stays within the bounds, by Adam. After each
    search step c goes halfway to the smallest c that has succeeded, or up by 10 while none has.

    Args:
      logits_fn: x [n, ...] -> logits [n, k]; for a randomized model see `average_logits`.
      x: examples [n, ...], in the threat model's bounds.
      y: true labels [n], or the labels to reach if targeted.
      threat_model: of norm "l2"; the epsilon within which a point counts, which may be [n].
      key: for the starts of all restarts but the first, which starts at x.
      steps: Adam steps for each c, at most; the authors' code allows 10,000. Each costs one forward
        and backward pass.
      learning_rate: of Adam.
      binary_search_steps: how many values of c.
      initial_const: the first c.
      confidence: the margin by which the label must lose, kappa.
      abort_early: stop an example whose loss no longer falls.
      restarts: the later ones start at random, at distance epsilon.
      targeted: look for the nearest point that is classified as y.
      x_init: start here [n, ...] in the first restart instead of at x.

    Returns:
      `AttackResult`: ``distance`` is the least found, inf for none and 0 for an x that is
      adversarial already. ``is_adversarial`` where it is at most epsilon; x_adv is the point found
      there and x elsewhere. ``loss`` is the margin at x_adv.

    Raises:
      ValueError: another norm than l2, labels that do not fit, images out of bounds or NaN, steps,
        binary_search_steps or restarts below 1.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x[:, 0], x[:, 1]], axis=1)
      >>> result = advmeta.attacks.carlini_wagner(
      ...     logits_fn, jnp.array([[0.6, 0.5]]), jnp.array([0]), key=jax.random.key(0),
      ...     threat_model=advmeta.ThreatModel("l2", epsilon=0.1))
      >>> round(float(result.distance[0]), 3)  # 0.1 / sqrt(2)
      0.071

    Reference:
      Carlini and Wagner 2017, Towards Evaluating the Robustness of Neural Networks, section VI-A.
      arXiv:1608.04644
    """
    check_counts(steps=steps, binary_search_steps=binary_search_steps, restarts=restarts)
    if threat_model.norm != "l2":
        raise ValueError(
            f"carlini_wagner minimises the l2 norm and the threat model has {threat_model.norm}: "
            "write ThreatModel('l2', ...), or use fab, which has all norms"
        )
    x, y = check_attack_inputs(logits_fn, x, y, threat_model)
    return _carlini_wagner(
        as_partial(logits_fn), x, y, threat_model, key, check_start(x_init, x),
        learning_rate, initial_const, confidence, abort_early,
        steps=steps, binary_search_steps=binary_search_steps, restarts=restarts, targeted=targeted,
    )  # fmt: skip


class _Const(NamedTuple):
    """The binary search."""

    value: Array  # [n]
    lower: Array  # [n], the largest c that has failed
    upper: Array  # [n], the smallest c that has succeeded


class _Descent(NamedTuple):
    """The search for one c."""

    step: Array
    w: Array
    adam: optax.OptState
    moves: Array  # [n] bool: not aborted
    earlier_loss: Array  # [n], at the last look
    succeeded: Array  # [n] bool: since the last look
    found: Found


@jax.jit(static_argnames=("steps", "binary_search_steps", "restarts", "targeted"))
def _carlini_wagner(
    logits_fn: Partial, x, y, threat_model, key, x_init, learning_rate, initial_const, confidence,
    abort_early, *, steps, binary_search_steps, restarts, targeted,
) -> AttackResult:  # fmt: skip
    n, keys = x.shape[0], example_keys(key, x)
    lower, upper = threat_model.bounds
    middle, half_width = (lower + upper) / 2, (upper - lower) / 2

    def to_w(x):
        return jnp.arctanh(INTERIOR * (x - middle) / half_width)

    def to_x(w):
        return jnp.clip(middle + half_width * jnp.tanh(w), lower, upper)

    def look(logits):
        """Whether each example is adversarial with confidence, how far it is off, its margin."""
        margin = losses.margin(logits, y)
        ahead = -margin if targeted else margin
        is_adversarial = losses.is_right(logits, y) == targeted
        # With confidence 0 the argmax decides ties, as everywhere else.
        succeeds = is_adversarial & ((ahead > confidence) | (confidence <= 0))
        return succeeds, jnp.maximum(confidence - ahead, 0.0), margin

    def penalty(w, const):
        x_w = to_x(w)
        succeeds, missing, margin = look(logits_fn(x_w))
        # The authors measure from where tanh can put x, which on the bounds is 5e-7 from x.
        squared = jnp.square(x_w - to_x(to_w(x))).reshape(n, -1).sum(axis=1)
        per_example = squared + const * missing
        found = Found(x_w, threat_model.distance(x, x_w), margin)
        return per_example.sum(), (per_example, succeeds, found)

    optimizer = optax.adam(learning_rate)
    look_every = max(steps // 10, 1)

    def step(const, state: _Descent) -> _Descent:
        gradient, (loss, succeeds, new) = jax.grad(penalty, has_aux=True)(state.w, const)
        succeeds = succeeds & state.moves
        update, adam = optimizer.update(gradient, state.adam)
        w = choose(state.moves, optax.tree.add(state.w, update), state.w)
        looks = state.step % look_every == 0
        stands_still = abort_early & looks & (loss > STILL * state.earlier_loss)
        moves = state.moves & ~stands_still
        return _Descent(
            state.step + 1, w, adam, moves, jnp.where(looks, loss, state.earlier_loss),
            (state.succeeded & ~(looks & moves)) | succeeds, state.found.nearer(new, succeeds),
        )  # fmt: skip

    def try_const(start, carry, index):
        found, const = carry
        # With many search steps the authors end on a c that is known to succeed.
        is_last = (index == binary_search_steps - 1) & (binary_search_steps >= 10)
        value = jnp.where(is_last, const.upper, const.value)
        state = _Descent(
            jnp.zeros([], jnp.int32), start, optimizer.init(start), jnp.ones(n, bool),
            jnp.full(n, jnp.inf, x.dtype), jnp.zeros(n, bool), found,
        )  # fmt: skip
        state = jax.lax.while_loop(
            lambda s: (s.step < steps) & s.moves.any(), lambda s: step(value, s), state
        )
        return (state.found, _next_const(const, value, state.succeeded)), None

    def run(found, restart):
        start = x if x_init is None else x_init
        if restarts > 1:
            noisy = random_start(threat_model, fold(keys, restart), x)
            start = jnp.where(restart == 0, start, noisy)
        const = _Const(
            jnp.full(n, initial_const, x.dtype), jnp.zeros(n, x.dtype),
            jnp.full(n, LARGEST_CONST, x.dtype),
        )  # fmt: skip
        (found, _), _ = jax.lax.scan(
            lambda carry, index: try_const(to_w(start), carry, index),
            (found, const), jnp.arange(binary_search_steps),
        )  # fmt: skip
        return found, None

    is_adversarial, _, margin = look(logits_fn(x))
    clean = nothing_yet(x, margin)
    found = clean._replace(distance=jnp.where(is_adversarial, 0.0, clean.distance))
    found, _ = jax.lax.scan(run, found, jnp.arange(restarts))
    return hand_out(found, clean, threat_model)


def _next_const(const: _Const, value: Array, succeeded: Array) -> _Const:
    lower = jnp.where(succeeded, const.lower, jnp.maximum(const.lower, value))
    upper = jnp.where(succeeded, jnp.minimum(const.upper, value), const.upper)
    # Below a tenth of the limit there has been a success.
    bracketed = upper < LARGEST_CONST / 10
    next_value = jnp.where(bracketed, (lower + upper) / 2, jnp.where(succeeded, value, 10 * value))
    return _Const(next_value, lower, upper)
