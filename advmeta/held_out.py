"""How a model fares on the examples that its inner steps did not see."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advmeta.attacks.projected_gradient import pgd
from advmeta.inner_gradients import attacked, mean_cross_entropy
from advmeta.notebook import html_table
from advmeta.tasks import Task, draw
from advmeta.types import Array, Key, Params


class HeldOutLoss(NamedTuple):
    """Mean cross-entropy [] on one batch of held-out examples."""

    clean: Array
    adversarial: Array


class Accuracy(NamedTuple):
    """Shares [] of all held-out examples."""

    clean: Array  # classified as their label
    robust: Array  # and still so after the attack

    def _repr_html_(self) -> str:
        shares = [float(v) if jnp.ndim(v) == 0 else v for v in self]
        return html_table(("clean accuracy", "robust accuracy"), [shares])


def held_out_loss(task: Task, params: Params, key: Key, *, attack_steps: int) -> HeldOutLoss:
    """Draws a batch and attacks it with PGD; the attack itself is not differentiated through."""
    draw_key, attack_key = jax.random.split(key)
    batch = draw(task.held_out, draw_key, task.batch_size)
    moved = attacked(task, params, batch, attack_key, attack_steps)
    return HeldOutLoss(
        clean=mean_cross_entropy(task, params, batch),
        adversarial=mean_cross_entropy(task, params, moved),
    )


def held_out_accuracy(
    task: Task, params: Params, key: Key, *, attack_steps: int = 40, restarts: int = 3
) -> Accuracy:
    """Clean accuracy, and robust accuracy under PGD, the worst restart for each example."""
    logits_fn = Partial(task.optimizee.apply, params)
    x, y = task.held_out
    correct = logits_fn(x).argmax(axis=-1) == y
    result = pgd(
        logits_fn, x, y, threat_model=task.threat_model, key=key,
        steps=attack_steps, restarts=restarts,
    )  # fmt: skip
    return Accuracy(correct.mean(), (correct & ~result.is_adversarial).mean())
