"""Projected gradient descent (Madry et al. 2018) and its single step, FGSM (Goodfellow 2015)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from advmeta.attacks.losses import is_right
from advmeta.attacks.threat_model import ThreatModel, example_keys
from advmeta.attacks.validation import AttackResult, as_partial, check_attack_inputs
from advmeta.types import Array, Key, LogitsFn

Loss = Callable[[Array, Array], Array]  # (logits [n, k], y [n]) -> [n]; the attack raises it
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def pgd(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    threat_model: ThreatModel,
    key: Key,
    steps: int = 40,
    step_size: float | Array | None = None,
    restarts: int = 1,
    targeted: bool = False,
    loss: Loss = cross_entropy,
    x_init: Array | None = None,
) -> AttackResult:
    """Projected gradient ascent on the loss, the best point on the path of the best restart.

    ``x_{t+1} = Project_{ball(x)}( x_t + step_size * steepest( grad_x loss(f(x_t), y) ) )``

    where ``steepest`` is the sign for linf, the unit vector for l2, and for l1 the signs of the
    largest twentieth of the entries over their number (`ThreatModel.steepest`). "Best" is
    misclassified before not, and then of the highest loss.

    Args:
      logits_fn: x [n, ...] -> logits [n, k]. Compiled once a function object;
        ``jax.tree_util.Partial(apply, params)`` is compiled once for all values of params.
      x: examples [n, ...], in the threat model's bounds.
      y: true labels [n], or the labels to reach if targeted.
      threat_model: the ball; its epsilon may be [n].
      key: for the random starts. Each example draws from its own key, so the result depends
        neither on the batch size nor on the order.
      steps: gradient steps a restart.
      step_size: in the units of x; by default 2.5 * epsilon / steps.
      restarts: random starts, uniform in the ball.
      targeted: lower the loss of the labels y instead of raising it.
      loss: (logits, labels) -> [n], cross-entropy by default.
      x_init: start here [n, ...] in the first restart instead of at random.

    Returns:
      `AttackResult`.

    Raises:
      ValueError: labels that do not fit, images out of bounds or NaN, steps or restarts below 1.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x[:, 0], x[:, 1]], axis=1)
      >>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
      >>> threat_model = advmeta.ThreatModel("linf", epsilon=0.1)
      >>> result = advmeta.attacks.pgd(
      ...     logits_fn, x, y, threat_model=threat_model, key=jax.random.key(0))
      >>> result.is_adversarial.tolist()  # the margins are 0.1 and 0.8; 0.2 is the most it can move
      [True, False]

    Reference:
      Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks, eq. in
      section 2.1. arXiv:1706.06083
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps={steps} and restarts={restarts} must both be at least 1")
    x, y = check_attack_inputs(logits_fn, x, y, threat_model)
    if x_init is not None and x_init.shape != x.shape:
        raise ValueError(f"x_init has shape {x_init.shape}; it must be x's, {x.shape}")
    result, _ = ascend(
        as_partial(logits_fn), x, y, threat_model, key, step_size, x_init,
        steps=steps, restarts=restarts, targeted=targeted, loss=loss,
    )  # fmt: skip
    return result


def fgsm(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    threat_model: ThreatModel,
    key: Key | None = None,
    targeted: bool = False,
    loss: Loss = cross_entropy,
) -> AttackResult:
    """One step of length epsilon from x, ``x + epsilon * steepest( grad_x loss(f(x), y) )``.

    It draws nothing: ``key`` is there so that every attack is called alike. Arguments, result and
    errors are those of `pgd`.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x[:, 0], x[:, 1]], axis=1)
      >>> result = advmeta.attacks.fgsm(logits_fn, jnp.array([[0.6, 0.5]]), jnp.array([0]),
      ...                               threat_model=advmeta.ThreatModel("linf", epsilon=0.1))
      >>> [round(v, 3) for v in result.x_adv[0].tolist()]
      [0.5, 0.6]

    Reference:
      Goodfellow et al. 2015, Explaining and Harnessing Adversarial Examples, section 4.
      arXiv:1412.6572
    """
    del key
    return pgd(
        logits_fn, x, y, threat_model=threat_model, key=jax.random.key(0), steps=1,
        step_size=threat_model.epsilon, targeted=targeted, loss=loss, x_init=x,
    )  # fmt: skip


class History(NamedTuple):
    """What the model said about every point of every path, the start first."""

    loss: Array  # [restarts, steps + 1, n]
    is_adversarial: Array  # the same, bool


class _Path(NamedTuple):
    x: Array  # the current iterate
    best: AttackResult  # the best point so far


@jax.jit(static_argnames=("steps", "restarts", "targeted", "loss"))
def ascend(
    logits_fn: Partial,
    x,
    y,
    threat_model,
    key,
    step_size,
    x_init,
    *,
    steps,
    restarts,
    targeted,
    loss,
) -> tuple[AttackResult, History]:
    """`pgd` on checked arguments, and what it saw on its way; step_size may be [n]."""
    if step_size is None:
        step_size = 2.5 * threat_model.radius(x) / steps
    else:
        step_size = ThreatModel(epsilon=step_size).radius(x)
    sign = -1.0 if targeted else 1.0

    def evaluate(x_t):
        """The loss to raise, its gradient, and whether each example is fooled."""

        def total_loss(x_t):
            logits = logits_fn(x_t)
            losses = sign * loss(logits, y)
            return losses.sum(), (losses, is_right(logits, y) == targeted)

        return jax.grad(total_loss, has_aux=True)(x_t)

    def step(path: _Path, _):
        gradient, (losses, is_adversarial) = evaluate(path.x)
        best = better(AttackResult(path.x, is_adversarial, losses), path.best)
        x_next = threat_model.project(path.x + step_size * threat_model.steepest(gradient), x)
        return _Path(x_next, best), (sign * losses, is_adversarial)

    def run(best: AttackResult, start_key_and_index):
        start_key, index = start_key_and_index
        start = threat_model.random_start(example_keys(start_key, x), x)
        if x_init is not None:
            start = jnp.where(index == 0, x_init, start)
        path, history = jax.lax.scan(step, _Path(start, best), length=steps)
        _, (losses, is_adversarial) = evaluate(path.x)
        history = jax.tree.map(
            lambda all_but_last, last: jnp.concatenate([all_but_last, last[None]]),
            History(*history), History(sign * losses, is_adversarial),
        )  # fmt: skip
        return better(AttackResult(path.x, is_adversarial, losses), path.best), history

    n = x.shape[0]
    worst = AttackResult(x, jnp.zeros(n, bool), jnp.full(n, -jnp.inf, x.dtype))
    starts = jax.random.split(key, restarts), jnp.arange(restarts)
    best, history = jax.lax.scan(run, worst, starts)
    return best._replace(loss=sign * best.loss), history


def better(a: AttackResult, b: AttackResult) -> AttackResult:
    """The stronger of two results for each example: adversarial first, then the higher loss."""
    take_a = jnp.where(a.is_adversarial == b.is_adversarial, a.loss > b.loss, a.is_adversarial)

    def choose(u, v):
        return jnp.where(take_a.reshape(take_a.shape + (1,) * (u.ndim - 1)), u, v)

    return jax.tree.map(choose, a, b)
