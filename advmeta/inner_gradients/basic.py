"""What an inner gradient is, and the basic ones.

They take the gradient of the loss on a batch of training examples that are clean, noisy, attacked
now (adversarial training), or were attacked once for another model (replayed).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import Partial

from advmeta.attacks.projected_gradient import Loss, cross_entropy, pgd
from advmeta.attacks.threat_model import ThreatModel
from advmeta.optimizees import Composed
from advmeta.tasks import Task, draw
from advmeta.types import Array, Batch, Key, Params, PyTree

# What a rematerialised step stores instead of computing it again: see `advmeta.unroll.unroll`.
CONSTANT = "constant"


class StatefulGradient(NamedTuple):
    """An inner gradient that remembers: its state goes from each inner step to the next."""

    init: Callable[[Task], PyTree]  # the state before the first step
    apply: Callable[[Task, Params, Key, PyTree], tuple[Array, Params, PyTree]]


InnerGradient = Callable[[Task, Params, Key], tuple[Array, Params]] | StatefulGradient


def stateful(inner_gradient: InnerGradient) -> StatefulGradient:
    """Any inner gradient as one that remembers; what a plain function remembers is ``()``."""
    if isinstance(inner_gradient, str):
        raise ValueError(
            f"inner_gradient={inner_gradient!r} is a name: write "
            f"advmeta.inner_gradients.by_name({inner_gradient!r})"
        )
    if isinstance(inner_gradient, StatefulGradient):
        return inner_gradient

    def apply(task: Task, params: Params, key: Key, state: PyTree):
        return *inner_gradient(task, params, key), state

    return StatefulGradient(lambda task: (), apply)


def mean_cross_entropy(task: Task, params: Params, batch: Batch) -> Array:
    """The mean loss [] of a model on a batch."""
    logits = task.optimizee.apply(params, batch.x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean()


def attacked(
    task: Task, params: Params, batch: Batch, key: Key, steps: int, loss: Loss = cross_entropy
) -> Batch:
    """The batch with its inputs moved by PGD, one restart; nothing differentiates through it."""
    params, batch = jax.lax.stop_gradient((params, batch))
    logits_fn = Partial(task.optimizee.apply, params)
    result = pgd(logits_fn, *batch, threat_model=task.threat_model, key=key, steps=steps, loss=loss)
    return batch._replace(x=checkpoint_name(jax.lax.stop_gradient(result.x_adv), CONSTANT))


def ascend(
    threat_model: ThreatModel,
    objective: Callable[[Array], Array],
    x: Array,
    start: Array,
    *,
    step_size: float | Array,
    steps: int,
) -> Array:
    """The last point of a projected steepest ascent within the balls around x, [n, ...].

    ``x_{t+1} = Project_{ball(x)}( x_t + step_size * steepest( grad objective(x_t) ) )``

    The published recipes train on this point. `pgd` would give them the best one of the path, for
    which it looks at the model once more.
    """

    def step(x_t: Array, _):
        direction = threat_model.steepest(jax.grad(objective)(x_t))
        return threat_model.project(x_t + step_size * direction, x), None

    x_adv, _ = jax.lax.scan(step, start, length=steps)
    return jax.lax.stop_gradient(x_adv)


def clean(task: Task, params: Params, key: Key) -> tuple[Array, Params]:
    """The examples as they are.

    ``grad_theta mean_i CE(f_theta(x_i), y_i)``
    """
    batch = draw(task.train, key, task.batch_size)
    return jax.value_and_grad(mean_cross_entropy, argnums=1)(task, params, batch)


def noisy(task: Task, params: Params, key: Key) -> tuple[Array, Params]:
    """The examples with Gaussian noise.

    Its standard deviation is ``task.noise`` times the l2 norm that an adversary's perturbation can
    have: ``epsilon sqrt(d)`` in linf for an example of d values, epsilon in l2. To first order
    noise then moves a logit by at least that share of what the adversary does, however large the
    images are: ``epsilon |J|_1 <= epsilon sqrt(d) |J|_2``. What it takes over the bounds stays
    there: clipped noise is brighter in the mean where images are black, which test images are not.
    Of the noise there is what the first layer sees of it, where that is known: `seen_noise`.
    """
    draw_key, noise_key = jax.random.split(key)
    batch = draw(task.train, draw_key, task.batch_size)
    sigma = task.noise * task.threat_model.l2_radius(batch.x[0].size)
    noise = sigma * seen_noise(task, params, batch.x, noise_key)
    batch = batch._replace(x=(batch.x + noise).astype(batch.x.dtype))
    return jax.value_and_grad(mean_cross_entropy, argnums=1)(task, params, batch)


def seen_noise(task: Task, params: Params, x: Array, key: Key) -> Array:
    """Gaussian noise [n, ...] of unit variance, or the part of it that the first layer sees.

    ``noise_i = Q g_i``,  ``Q R = W``, the kernel [inputs, outputs],  g_i normal, [outputs]

    The rest, ``(1 - Q Q^T) noise_i``, moves no output of the layer, and so nothing that the model
    computes depends on it. In the layer's gradient, ``sum_i (x_i + noise_i) dCE/dz_i^T``, its mean
    is zero and its variance is not: an MLP of 20 units on 784 pixels sees 20 of 784 directions, and
    would learn from noise in the others. (Q is held fixed, which changes second derivatives.)

    All of the noise is there where the optimizee is not `Composed`; where the first layer has no
    fewer outputs than inputs; and where it has more than a quarter as many as the batch has
    examples: Q then takes longer than what it saves, n times the inputs of random numbers.
    """
    model, n, shape = task.optimizee.apply, len(x), x.shape[1:]
    whole = functools.partial(jax.random.normal, key, x.shape, x.dtype)
    if not isinstance(model, Composed):
        return whole()
    first = functools.partial(model.first, jax.lax.stop_gradient(params))
    outputs, inputs = jax.eval_shape(first, x[:1]).size, math.prod(shape)
    if outputs >= inputs or 4 * outputs > n:
        return whole()
    dtype = jnp.promote_types(x.dtype, jnp.float32)  # there is no QR of shorter floats
    jacobian = jax.jacrev(first)(jnp.zeros((1, *shape), x.dtype))  # the same for any x
    q, _ = jnp.linalg.qr(jacobian.reshape(outputs, inputs).T.astype(dtype))
    noise = jax.random.normal(key, (n, outputs), dtype) @ q.T
    return noise.reshape(x.shape).astype(x.dtype)


def adversarial(steps: int = 7) -> InnerGradient:
    """The examples attacked by PGD on the current parameters: adversarial training.

    ``grad_theta mean_i max_{x' in ball(x_i)} CE(f_theta(x'), y_i)``

    Reference:
      Madry et al. 2018, eq. 2.1. arXiv:1706.06083
    """

    def gradient(task: Task, params: Params, key: Key):
        draw_key, attack_key = jax.random.split(key)
        batch = draw(task.train, draw_key, task.batch_size)
        batch = attacked(task, params, batch, attack_key, steps)
        return jax.value_and_grad(mean_cross_entropy, argnums=1)(task, params, batch)

    return gradient


def replayed(task: Task, params: Params, key: Key) -> tuple[Array, Params]:
    """Adversarial examples made once, for another model of the same data: ``task.replay``.

    Raises:
      ValueError: the task has none; `advmeta.unroll.with_replay` makes them.
    """
    if task.replay is None:
        raise ValueError(
            "the task has no replayed examples: make them with "
            "advmeta.unroll.with_replay(task, key), or give Task(replay=x_adv)"
        )
    on_replay = dataclasses.replace(task, train=task.train._replace(x=task.replay))
    return clean(on_replay, params, key)
