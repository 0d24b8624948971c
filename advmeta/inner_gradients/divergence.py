"""TRADES and VAT: cross-entropy, and how far the predictions move when the input does.

Both write ``KL(x, x') = mean_i KL( p(.|x_i) || p(.|x'_i) )`` for predictions ``p = softmax(f)``.
"""

from collections.abc import Callable

import jax
import optax

from advmeta.attacks.losses import cross_entropy
from advmeta.attacks.runs import check_counts
from advmeta.attacks.threat_model import ThreatModel
from advmeta.inner_gradients.basic import InnerGradient, ascend
from advmeta.tasks import Task, draw
from advmeta.types import Array, Key, Params


def trades(beta: float = 6.0, steps: int = 10) -> InnerGradient:
    """Cross-entropy on clean examples, and the farthest that the adversary moves the predictions.

    ``grad_theta  mean_i CE(f_theta(x_i), y_i) + beta max_{x' in ball(x)} KL(x, x')``

    The maximum is sought by sign ascent from a point next to x, where KL has no gradient. The
    gradient goes through both sides of KL. A step costs ``steps + 2`` gradient evaluations.

    Args:
      beta: weight of the divergence, 1 / lambda in the paper.
      steps: of the ascent, 2.5 * epsilon / steps long: a quarter of epsilon for 10, where the
        paper has 0.007 of 0.031.

    Raises:
      ValueError: steps below 1.

    Example:
      >>> digits = advmeta.data.load("digits")
      >>> task = advmeta.Task(digits.train, digits.test, advmeta.ThreatModel("linf", 0.1),
      ...                     advmeta.optimizees.linear())
      >>> params, trajectory = advmeta.train(
      ...     task, optax.adam(1e-2), jax.random.key(0), steps=50,
      ...     inner_gradient=advmeta.inner_gradients.trades())
      >>> bool(trajectory.loss[-1] < trajectory.loss[0])
      True

    Reference:
      Zhang et al. 2019, Theoretically Principled Trade-off between Robustness and Accuracy,
      algorithm 1. arXiv:1901.08573
    """
    check_counts(steps=steps)

    def gradient(task: Task, params: Params, key: Key):
        draw_key, start_key = jax.random.split(key)
        x, y = draw(task.train, draw_key, task.batch_size)
        logits_fn = _fixed_model(task, params)
        logits = logits_fn(x)
        start = x + 1e-3 * jax.random.normal(start_key, x.shape, x.dtype)
        x_adv = ascend(
            task.threat_model, lambda x_t: divergence(logits, logits_fn(x_t)), x,
            task.threat_model.project(start, x),
            step_size=2.5 * task.threat_model.radius(x) / steps, steps=steps,
        )  # fmt: skip

        def loss(params: Params) -> Array:
            logits = task.optimizee.apply(params, x)
            moved = task.optimizee.apply(params, x_adv)
            return cross_entropy(logits, y).mean() + beta * divergence(logits, moved)

        return jax.value_and_grad(loss)(params)

    return gradient


def vat(weight: float = 1.0, iterations: int = 1) -> InnerGradient:
    """Virtual adversarial training: smooth predictions in the direction where they are least so.

    ``grad_theta  mean_i CE(f_theta(x_i), y_i) + weight KL_fixed(x, x + r)``

    KL_fixed takes the predictions at x as constants. The perturbation r needs no label; see
    `virtual_adversarial`. A step costs ``iterations + 2`` gradient evaluations.

    Args:
      weight: of the divergence, lambda in the paper.
      iterations: of the power method.

    Raises:
      ValueError: iterations below 1.

    Reference:
      Miyato et al. 2015, Distributional Smoothing with Virtual Adversarial Training, algorithm 1.
      arXiv:1507.00677
    """
    check_counts(iterations=iterations)

    def gradient(task: Task, params: Params, key: Key):
        draw_key, start_key = jax.random.split(key)
        x, y = draw(task.train, draw_key, task.batch_size)
        x_adv = virtual_adversarial(task, params, x, start_key, iterations)

        def loss(params: Params) -> Array:
            logits = task.optimizee.apply(params, x)
            moved = task.optimizee.apply(params, x_adv)
            smoothness = divergence(jax.lax.stop_gradient(logits), moved)
            return cross_entropy(logits, y).mean() + weight * smoothness

        return jax.value_and_grad(loss)(params)

    return gradient


def virtual_adversarial(task: Task, params: Params, x: Array, key: Key, iterations: int) -> Array:
    """The inputs moved along the top eigenvector of KL's Hessian, by the power method.

    ``x + epsilon steepest(d)``,  ``d <- H d / ||H d||_2`` from a random d,
    ``H = grad_r^2 KL(x, x + r) at r = 0``

    For l2 ``steepest(d)`` is d, the paper's perturbation; for linf it is its sign, the longest move
    in the ball along d, and for l1 the signs of its largest entries. It is clipped to the bounds.

    Args:
      task: the model and the threat model.
      params: of the model; nothing is differentiated through them.
      x: examples [n, ...].
      key: for the first d.
      iterations: products with H, one gradient evaluation each.

    Returns:
      The moved examples [n, ...].
    """
    hessian_product = _hessian_product(_fixed_model(task, params), x)
    unit = ThreatModel("l2").steepest

    def iterate(d: Array, _):
        return unit(hessian_product(d)), None

    d = unit(jax.random.normal(key, x.shape, x.dtype))
    d, _ = jax.lax.scan(iterate, d, length=iterations)
    threat_model = task.threat_model
    moved = x + threat_model.radius(x) * threat_model.steepest(d)
    return threat_model.project(moved, x)


def divergence(logits: Array, moved: Array) -> Array:
    """The mean over examples of KL( softmax(logits) || softmax(moved) ), []."""
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(moved)
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p).mean()


def _hessian_product(logits_fn: Callable, x: Array) -> Callable[[Array], Array]:
    """``d -> H d``, ``H = J^T (diag(p) - p p^T) J`` with the Jacobian J of the logits at x.

    At r = 0 that is KL's whole Hessian: the terms with second derivatives of the logits are
    weighted by the gradient of KL there, which is 0. The paper takes the difference of two
    gradients xi = 1e-6 apart, of which float32 leaves few digits.
    """
    logits, jvp = jax.linearize(logits_fn, x)
    vjp = jax.linear_transpose(jvp, x)
    p = jax.nn.softmax(logits)

    def product(d: Array) -> Array:
        t = jvp(d)
        (hessian_d,) = vjp(p * (t - (p * t).sum(axis=-1, keepdims=True)))
        return hessian_d

    return product


def _fixed_model(task: Task, params: Params) -> Callable[[Array], Array]:
    """The model as a function of x alone; nothing is differentiated through its parameters."""
    params = jax.lax.stop_gradient(params)
    return lambda x: task.optimizee.apply(params, x)
