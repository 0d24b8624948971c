"""Adversarial training with fewer gradient evaluations than PGD's."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from advmeta.attacks.losses import cross_entropy
from advmeta.attacks.runs import check_counts
from advmeta.inner_gradients.basic import (
    CONSTANT,
    InnerGradient,
    StatefulGradient,
    ascend,
    mean_cross_entropy,
)
from advmeta.optimizees import Composed
from advmeta.tasks import Task, draw, take
from advmeta.types import Array, Batch, Key, Params


def fgsm_rs(task: Task, params: Params, key: Key) -> tuple[Array, Params]:
    """The examples attacked by one step from a random start.

    ``grad_theta mean_i CE(f_theta(x'_i), y_i)``,
    ``x' = Project( x_0 + 1.25 epsilon steepest( grad_x CE(f(x_0), y) ) )``, x_0 uniform in the ball

    The step of 1.25 epsilon is the paper's: 10/255 where epsilon is 8/255. An inner step costs 2
    gradient evaluations.

    Reference:
      Wong et al. 2020, Fast is better than free: Revisiting adversarial training, algorithm 3.
      arXiv:2001.03994
    """
    draw_key, start_key = jax.random.split(key)
    x, y = draw(task.train, draw_key, task.batch_size)
    fixed = jax.lax.stop_gradient(params)
    x_adv = ascend(
        task.threat_model, lambda x_t: mean_cross_entropy(task, fixed, Batch(x_t, y)), x,
        task.threat_model.random_start(jax.random.split(start_key, len(y)), x),
        step_size=1.25 * task.threat_model.radius(x), steps=1,
    )  # fmt: skip
    return jax.value_and_grad(mean_cross_entropy, argnums=1)(task, params, Batch(x_adv, y))


class FreeState(NamedTuple):
    """What `free` keeps from one inner step to the next."""

    batch: Batch  # of the last step
    delta: Array  # [batch_size, ...]: its perturbation
    replays: Array  # [] int32: steps that the batch was used for, modulo m


def free(m: int = 8) -> StatefulGradient:
    """Adversarial training for free: one backward pass for the weights and the perturbation.

    ``g_t = grad_theta mean_i CE(f_theta(x_i + delta_i), y_i)``,
    ``delta <- Project( delta + epsilon steepest( grad_x CE(f_theta(x + delta), y) ) )``

    A batch is kept for m inner steps, and the perturbation throughout: a new batch starts with the
    last one's. An inner step costs 1 gradient evaluation.

    Args:
      m: inner steps on each batch; the paper has 8 for CIFAR-10.

    Returns:
      A `StatefulGradient`; `advmeta.train` and `advmeta.unroll.unroll` carry its state.

    Raises:
      ValueError: m below 1.

    Example:
      >>> digits = advmeta.data.load("digits")
      >>> task = advmeta.Task(digits.train, digits.test, advmeta.ThreatModel("linf", 0.1),
      ...                     advmeta.optimizees.linear())
      >>> params, trajectory = advmeta.train(
      ...     task, optax.adam(1e-2), jax.random.key(0), steps=64,
      ...     inner_gradient=advmeta.inner_gradients.free(m=8))
      >>> bool(trajectory.loss[-1] < trajectory.loss[0])
      True

    Reference:
      Shafahi et al. 2019, Adversarial Training for Free!, algorithm 1. arXiv:1904.12843
    """
    check_counts(m=m)

    def init(task: Task) -> FreeState:
        batch = jax.tree.map(
            lambda a: jnp.zeros((task.batch_size, *a.shape[1:]), a.dtype), task.train
        )
        return FreeState(batch, jnp.zeros_like(batch.x), jnp.zeros([], jnp.int32))

    def apply(task: Task, params: Params, key: Key, state: FreeState):
        new = draw(task.train, key, task.batch_size)
        x, y = jax.tree.map(lambda a, b: jnp.where(state.replays == 0, a, b), new, state.batch)
        value, gradient, delta = _and_ascent(task, params, Batch(x, y), state.delta)
        return value, gradient, FreeState(Batch(x, y), delta, (state.replays + 1) % m)

    return StatefulGradient(init, apply)


def remembered() -> StatefulGradient:
    """Adversarial training with one gradient a step: each example remembers its perturbation.

    ``g_t = grad_theta mean_i CE(f_theta(x_i + delta_i), y_i)``,
    ``delta_i <- Project( delta_i + epsilon steepest( grad_x CE(f_theta(x_i + delta_i), y_i) ) )``

    i are the examples of the batch, and delta_i is zero until an example was drawn once. One
    backward pass is for the weights and for the perturbations, as in `free`; but a perturbation
    stays with its example, and no batch has to be kept. An inner step costs 1 gradient evaluation.
    The state is as large as ``task.train.x`` and in its order. An example that is drawn for the
    first time is clean, and what it remembers is as old as its last visit.

    Returns:
      A `StatefulGradient`; `advmeta.train` and `advmeta.unroll.unroll` carry its state.

    Raises:
      ValueError: when called, examples of whole numbers, or the state of another training set.

    Example:
      >>> digits = advmeta.data.load("digits")
      >>> task = advmeta.Task(digits.train, digits.test, advmeta.ThreatModel("linf", 0.1),
      ...                     advmeta.optimizees.linear())
      >>> params, trajectory = advmeta.train(
      ...     task, optax.adam(1e-2), jax.random.key(0), steps=64,
      ...     inner_gradient=advmeta.inner_gradients.remembered())
      >>> bool(trajectory.loss[-1] < trajectory.loss[0])
      True

    Reference:
      The memory is that of Zheng et al. 2020, Efficient Adversarial Training with Transferable
      Adversarial Examples (arXiv:1912.11969), who attack anew from where it points; the one
      backward pass that of Shafahi et al. 2019, algorithm 1 (arXiv:1904.12843).
    """

    def init(task: Task) -> Array:
        if not jnp.issubdtype(task.train.x.dtype, jnp.floating):
            raise ValueError(
                f"train.x is of {task.train.x.dtype}, which holds no perturbation: write "
                "train._replace(x=train.x / 255.0), say, and bounds and epsilon for that"
            )
        return jnp.zeros_like(task.train.x)

    def apply(task: Task, params: Params, key: Key, state: Array):
        if state.shape != task.train.x.shape:
            raise ValueError(
                f"the state has perturbations of {state.shape}, and the training set is "
                f"{task.train.x.shape}: start from init_inner(task, ...) with this task"
            )
        everything = jnp.arange(len(task.train.y))
        i = draw(Batch(everything, everything), key, task.batch_size).x
        batch = take(task.train, i)
        value, gradient, delta = _and_ascent(task, params, batch, state[i])
        return value, gradient, state.at[i].set(delta)

    return StatefulGradient(init, apply)


def _and_ascent(task: Task, params: Params, batch: Batch, delta: Array):
    """The loss at x + delta, its gradient by the weights, and delta after a step along that by x.

    One backward pass for both gradients.
    """
    # In `free` it may be another example's, which leaves the bounds.
    x_adv = task.threat_model.project(batch.x + delta, batch.x)
    x_adv = checkpoint_name(jax.lax.stop_gradient(x_adv), CONSTANT)

    def loss(params: Params, x_adv: Array) -> Array:
        return mean_cross_entropy(task, params, Batch(x_adv, batch.y))

    value, (gradient, ascent) = jax.value_and_grad(loss, argnums=(0, 1))(params, x_adv)
    step = task.threat_model.radius(batch.x) * task.threat_model.steepest(ascent)
    moved = task.threat_model.project(x_adv + step, batch.x) - batch.x
    # A step that failed must not be remembered.
    moved = jnp.where(jnp.isfinite(moved), moved, 0)
    return value, gradient, jax.lax.stop_gradient(moved)


def yopo(m: int = 5, n: int = 3) -> InnerGradient:
    """YOPO-m-n: m passes through the model, each followed by n attack steps in its first layer.

    With the first layer ``z = f_0(x, theta_0)``, pass j = 1..m from x_1 uniform in the ball:

    ``p_j = grad_z CE(rest(z), y) at z = f_0(x_j)``, then held fixed,
    ``x_{j+1} = n times  x' <- Project( x' + epsilon / 4 steepest( grad_x' <p_j, f_0(x')> ) )``,
    ``g = mean_j [ grad_rest CE(rest(f_0(x_j)), y) + grad_{theta_0} <p_j, f_0(x_{j+1})> ]``

    The authors' program adds up the m gradients and divides the learning rate by m; this is their
    mean. Its step is 2/255 where epsilon is 8/255. An inner step costs m gradient evaluations;
    its ``m (n + 1)`` passes through the first layer alone are not counted.

    Args:
      m: passes through the whole model.
      n: attack steps after each.

    Raises:
      ValueError: m or n below 1; or, when called, an optimizee whose first layer is not known.

    Reference:
      Zhang et al. 2019, You Only Propagate Once: Accelerating Adversarial Training via Maximal
      Principle, algorithm 1. arXiv:1905.00877
    """
    check_counts(m=m, n=n)

    def gradient(task: Task, params: Params, key: Key):
        draw_key, start_key = jax.random.split(key)
        x, y = draw(task.train, draw_key, task.batch_size)
        start = task.threat_model.random_start(jax.random.split(start_key, len(y)), x)

        def one_pass(x_j: Array, _):
            loss, gradient, x_next = _yopo_pass(task, params, x, x_j, y, n)
            return x_next, (loss, gradient)

        _, passes = jax.lax.scan(one_pass, start, length=m)
        return jax.tree.map(lambda a: a.mean(axis=0), passes)

    return gradient


def _yopo_pass(task: Task, params: Params, x: Array, x_j: Array, y: Array, n: int):
    """One pass of `yopo`: the loss at x_j, the gradient, and the next x_j."""
    model, fixed = _composed(task), jax.lax.stop_gradient(params)

    def loss_of_rest(params: Params, z: Array) -> Array:
        return cross_entropy(model.rest(params, z), y).mean()

    value_and_grads = jax.value_and_grad(loss_of_rest, argnums=(0, 1))
    loss, (of_rest, p) = value_and_grads(params, model.first(fixed, x_j))
    p = jax.lax.stop_gradient(p)

    def product(params: Params, x: Array) -> Array:
        return (p * model.first(params, x)).sum()

    x_next = ascend(
        task.threat_model, lambda x_t: product(fixed, x_t), x, x_j,
        step_size=task.threat_model.radius(x) / 4, steps=n,
    )  # fmt: skip
    of_first = jax.grad(product)(params, x_next)
    return loss, jax.tree.map(jnp.add, of_rest, of_first), x_next


def _composed(task: Task) -> Composed:
    apply = task.optimizee.apply
    if not isinstance(apply, Composed):
        raise ValueError(
            f"the optimizee's apply is {apply!r}; YOPO attacks its first layer alone and must know "
            "it: write Optimizee(init, advmeta.optimizees.Composed(first, rest)), where "
            "rest(params, first(params, x)) is apply(params, x)"
        )
    return apply
