"""How a model fares on the examples that its inner steps did not see."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from advmeta.attacks.losses import is_right, margin
from advmeta.attacks.projected_gradient import Loss, cross_entropy, pgd
from advmeta.inner_gradients import attacked
from advmeta.notebook import html_table
from advmeta.tasks import Task, draw
from advmeta.types import Array, Batch, Key, Params


def calibrated(logits: Array, labels: Array) -> Array:
    """The cross-entropy of each example [n] at the inverse temperature that is best for the batch.

    ``CE(b z_i, y_i)``  with  ``b = argmin_b' mean_i CE(b' z_i, y_i)``,  from 1/32 to 32 times
    ``1 / rms(z)``

    Robust accuracy does not depend on the scale of the logits, and neither does this. The plain
    cross-entropy does, and strongly regularised models have small logits: what is meta-trained on
    it learns to regularise less.
    """
    z = jax.lax.stop_gradient(logits)
    unit = jax.lax.rsqrt(jnp.square(z).mean() + 1e-12)
    slope = jax.grad(lambda b: cross_entropy(jnp.exp(b) * unit * z, labels).mean())

    def halve(_, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = (low + high) / 2
        rising = slope(middle) > 0
        return jnp.where(rising, low, middle), jnp.where(rising, middle, high)

    limits = (jnp.float32(-np.log(32)), jnp.float32(np.log(32)))
    low, high = jax.lax.fori_loop(0, 10, halve, limits)
    return cross_entropy(jnp.exp((low + high) / 2) * unit * logits, labels)


def error(logits: Array, labels: Array) -> Array:
    """0 where the label has the largest logit, else 1. [n]; it has no gradient."""
    return jnp.float32(~is_right(logits, labels))


# (logits [n, k], labels [n]) -> [n]
LOSSES = {"cross_entropy": cross_entropy, "calibrated": calibrated, "error": error}


class HeldOutLoss(NamedTuple):
    """Mean loss [] on one batch of held-out examples."""

    clean: Array
    adversarial: Array


class Accuracy(NamedTuple):
    """Shares [] of all held-out examples."""

    clean: Array  # classified as their label
    robust: Array  # and still so after the attack

    def _repr_html_(self) -> str:
        shares = [float(v) if jnp.ndim(v) == 0 else v for v in self]
        return html_table(("clean accuracy", "robust accuracy"), [shares])


def held_out_loss(
    task: Task,
    params: Params,
    key: Key,
    *,
    attack_steps: int,
    loss: str = "cross_entropy",
    examples: int = 128,
) -> HeldOutLoss:
    """Draws a batch and attacks it with PGD; the attack itself is not differentiated through.

    ``loss`` is one of `LOSSES`. The attack's is the margin, whatever the loss: it finds more where
    logits are small, as those of strongly regularised models are.
    """
    draw_key, attack_key = jax.random.split(key)
    batch = draw(task.held_out, draw_key, examples)
    moved = attacked(task, params, batch, attack_key, attack_steps, margin)

    def mean(batch: Batch) -> Array:
        return LOSSES[loss](task.optimizee.apply(params, batch.x), batch.y).mean()

    return HeldOutLoss(clean=mean(batch), adversarial=mean(moved))


def held_out_accuracy(
    task: Task,
    params: Params,
    key: Key,
    *,
    attack_steps: int = 40,
    restarts: int = 3,
    loss: Loss = margin,
) -> Accuracy:
    """Clean accuracy, and robust accuracy under PGD, the worst restart for each example.

    ``loss`` is what the attack raises: the margin, since the cross-entropy finds less where logits
    are small, as those of strongly regularised models are.
    """
    logits_fn = Partial(task.optimizee.apply, params)
    x, y = task.held_out
    correct = is_right(logits_fn(x), y)
    result = pgd(
        logits_fn, x, y, threat_model=task.threat_model, key=key,
        steps=attack_steps, restarts=restarts, loss=loss,
    )  # fmt: skip
    return Accuracy(correct.mean(), (correct & ~result.is_adversarial).mean())
