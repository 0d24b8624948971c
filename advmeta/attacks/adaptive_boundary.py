"""FAB, the fast adaptive boundary attack (Croce and Hein 2020), and its targeted form FAB-T.

It looks for the nearest adversarial example, so epsilon matters only for what counts as found.
Follows the reference implementation, fra31/auto-attack.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advmeta.attacks import losses
from advmeta.attacks.auto_pgd import random_start
from advmeta.attacks.batching import choose, fold, to_reduce, wide
from advmeta.attacks.minimum_norm import Found, hand_out, nothing_yet
from advmeta.attacks.projections import shortest_move
from advmeta.attacks.runs import prepare
from advmeta.attacks.threat_model import ThreatModel, example_keys
from advmeta.attacks.validation import AttackResult
from advmeta.types import Array, Key, LogitsFn

ALPHA_MAX = 0.1  # the most that an iteration is pulled towards the original point
OVERSHOOT = 1.05  # eta: how far beyond the hyperplane it steps
BACKWARD = 0.9  # beta: how far it goes back to the original point from an adversarial one


def fab(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    threat_model: ThreatModel,
    key: Key,
    target_ranks: Sequence[int] | None = None,
    steps: int = 100,
    restarts: int = 1,
    targeted: bool = False,
    x_init: Array | None = None,
    stop_at_epsilon: bool = False,
) -> AttackResult:
    """Walks along the linearised decision boundary, pulled towards x; the nearest point it meets.

    ``x_{t+1} = clip( (1-alpha) (x_t + eta d(x_t)) + alpha (x + eta d(x)) )``

    where d(.) is the shortest move onto the hyperplane that approximates the boundary at x_t, eta =
    1.05 and ``alpha = min(0.1, ||d(x_t)|| / (||d(x_t)|| + ||d(x)||))``. An adversarial x_{t+1} goes
    back by a tenth of the way to x.

    Args:
      logits_fn: x [n, ...] -> logits [n, k]; for a randomized model see `average_logits`.
      x: examples [n, ...], in the threat model's bounds.
      y: true labels [n], or the labels to reach if targeted.
      threat_model: the norm of the distance, and the epsilon within which it counts; may be [n].
      key: for the starts of all restarts but the first, which starts at x.
      target_ranks: one run for each class of this rank in the clean logits, towards its boundary
        with y: FAB-T, ``range(2, 11)`` in AutoAttack. Without it, each step goes to the nearest of
        all boundaries, for one backward pass a class.
      steps: each costs one backward and two forward passes.
      restarts: the later ones start at random, half as far away as the best point so far, and
        epsilon at most.
      targeted: look for the nearest point that is classified as y.
      x_init: start here [n, ...] in the first restart instead of at x.
      stop_at_epsilon: as in the reference, leave out of the later ranks and restarts what lies
        within epsilon already. Same ``is_adversarial``, less work, larger distances.

    Returns:
      `AttackResult`: ``distance`` is the least found, inf for none and 0 for an x that is
      adversarial already. ``is_adversarial`` where it is at most epsilon; x_adv is the point found
      there and x elsewhere. ``loss`` is the margin at x_adv.

    Raises:
      ValueError: labels that do not fit, images out of bounds or NaN, ranks together with targeted,
        steps or restarts below 1.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x[:, 0], x[:, 1]], axis=1)
      >>> result = advmeta.attacks.fab(
      ...     logits_fn, jnp.array([[0.6, 0.5]]), jnp.array([0]), key=jax.random.key(0),
      ...     threat_model=advmeta.ThreatModel("l2", epsilon=0.1))
      >>> round(float(result.distance[0]), 3)  # 0.1 / sqrt(2)
      0.071

    Reference:
      Croce and Hein 2020, Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary
      Attack, algorithm 1. arXiv:1907.02044
    """
    prepared = prepare(
        logits_fn, x, y, threat_model, key, loss="margin", target_ranks=target_ranks, x_init=x_init,
        targeted=targeted, eot_samples=None, steps=steps, restarts=restarts,
    )  # fmt: skip
    logits_fn, x, y, x_init, ranks, _, note = prepared
    result = _fab(
        logits_fn, x, y, threat_model, key, ranks, x_init, stop_at_epsilon,
        steps=steps, restarts=restarts, targeted=targeted,
    )  # fmt: skip
    return result._replace(note=note)


@jax.jit(static_argnames=("steps", "restarts", "targeted"))
def _fab(
    logits_fn: Partial, x, y, threat_model, key, target_ranks, x_init, stop_at_epsilon,
    *, steps, restarts, targeted,
) -> AttackResult:  # fmt: skip
    epsilon = jnp.asarray(threat_model.epsilon, x.dtype)
    keys = example_keys(key, x)
    ranks = jnp.zeros(1, jnp.int32) if target_ranks is None else target_ranks

    def look(x):
        """Whether each point is adversarial, its margin, and the logits."""
        logits = logits_fn(x)
        return losses.is_right(logits, y) == targeted, losses.margin(logits, y), logits

    def is_done(found):
        return found.distance <= jnp.where(stop_at_epsilon, epsilon, 0.0)

    def run(carry):
        index, found = carry
        if target_ranks is not None:
            target = losses.target_of_rank(clean_logits, ranks[index // restarts])
            boundary = _boundary(lambda z: losses.targeted_margin(z, y, target), logits_fn)
        elif targeted:
            boundary = _boundary(lambda z: -losses.margin(z, y), logits_fn)
        else:
            boundary = _nearest_boundary(logits_fn, y, threat_model.norm)
        radius = jnp.minimum(found.distance, epsilon) / 2
        start = random_start(
            dataclasses.replace(threat_model, epsilon=radius), fold(keys, index), x
        )
        start = jnp.where(index % restarts == 0, x if x_init is None else x_init, start)
        new = _walk(boundary, look, threat_model, x, start, clean, steps)
        return index + 1, found.nearer(new, ~is_done(found))

    is_adversarial, loss, clean_logits = look(x)
    clean = nothing_yet(x, loss)
    found = clean._replace(distance=jnp.where(is_adversarial, 0.0, clean.distance))
    runs = ranks.shape[0] * restarts
    _, found = jax.lax.while_loop(
        lambda carry: (carry[0] < runs) & ~is_done(carry[1]).all(), run, (0, found)
    )
    return hand_out(found, clean, threat_model)


def _walk(boundary, look, threat_model, x, start, nothing: Found, steps) -> Found:
    """One run: the nearest adversarial point on the way."""
    norm, bounds = threat_model.norm, threat_model.bounds

    def step(carry, _):
        x_t, found = carry
        value, gradient = boundary(x_t)
        # Both points see the same plane, value + <gradient, z - x_t> = 0.
        rise = to_reduce(gradient * (x_t - x)).sum(axis=tuple(range(1, x.ndim)))
        moves = shortest_move(
            jnp.concatenate([x_t, x]), jnp.concatenate([gradient, gradient]),
            jnp.concatenate([-value, rise - value]), norm=norm, bounds=bounds,
        )  # fmt: skip
        lengths = jnp.maximum(threat_model.distance(jnp.zeros_like(moves), moves), 1e-8)
        (move, move_x), (length, length_x) = jnp.split(moves, 2), jnp.split(lengths, 2)
        alpha = wide(jnp.minimum(length / (length + length_x), ALPHA_MAX), x)
        x_next = (1 - alpha) * (x_t + OVERSHOOT * move) + alpha * (x + OVERSHOOT * move_x)
        x_next = jnp.clip(x_next, *bounds)
        is_adversarial, loss, _ = look(x_next)
        found = found.nearer(Found(x_next, threat_model.distance(x, x_next), loss), is_adversarial)
        return (choose(is_adversarial, x + BACKWARD * (x_next - x), x_next), found), None

    (_, found), _ = jax.lax.scan(step, (start, nothing), length=steps)
    return found


def _boundary(value_of, logits_fn):
    """x -> (value [n], gradient [n, ...]) of a function of the logits that is 0 on the boundary."""

    def boundary(x):
        def total(x):
            value = value_of(logits_fn(x))
            return value.sum(), value

        gradient, value = jax.grad(total, has_aux=True)(x)
        return value, gradient

    return boundary


def _nearest_boundary(logits_fn, y, norm):
    """The same for the class whose boundary with y is nearest, if the model were linear."""

    def boundary(x):
        logits, pull_back = jax.vjp(logits_fn, x)
        n, classes = logits.shape
        one_hot = jax.nn.one_hot(jnp.arange(classes), classes, dtype=logits.dtype)
        jacobian = jax.vmap(lambda row: pull_back(jnp.broadcast_to(row, (n, classes)))[0])(one_hot)
        rows = jnp.arange(n)
        values = logits - logits[rows, y][:, None]
        gradients = jacobian - jacobian[y, rows]
        # The distance in a norm is |value| over the dual norm of the gradient.
        flat = gradients.reshape(classes, n, -1)
        dual = {
            "linf": lambda v: to_reduce(jnp.abs(v)).sum(-1),
            "l2": lambda v: jnp.sqrt(to_reduce(jnp.square(v)).sum(-1)),
            "l1": lambda v: to_reduce(jnp.abs(v)).max(-1),
        }[norm](flat)
        distances = jnp.abs(values) / (dual.T + 1e-12)
        nearest = jnp.where(jnp.arange(classes) == y[:, None], jnp.inf, distances).argmin(axis=1)
        return values[rows, nearest], gradients[nearest, rows]

    return boundary
