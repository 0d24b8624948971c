"""Random noise in the ball: the control that every attack that uses gradients must beat."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from advmeta.attacks import losses
from advmeta.attacks.batching import fold
from advmeta.attacks.projected_gradient import better
from advmeta.attacks.runs import check_counts
from advmeta.attacks.threat_model import ThreatModel, example_keys
from advmeta.attacks.validation import AttackResult, as_partial, check_attack_inputs
from advmeta.types import Array, Key, LogitsFn


def uniform_noise(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    threat_model: ThreatModel,
    key: Key,
    samples: int = 100,
    targeted: bool = False,
) -> AttackResult:
    """The worst of several points drawn uniformly from the ball, then clipped to the bounds.

    ``argmax_s L(f(x + u_s), y),  u_s ~ U{u: ||u|| <= epsilon},  L(z, y) = max_{i != y} z_i - z_y``

    An attack that breaks fewer examples than this does not optimise anything.

    Args:
      logits_fn: x [n, ...] -> logits [n, k].
      x: examples [n, ...], in the threat model's bounds.
      y: true labels [n], or the labels to reach if targeted.
      threat_model: the ball; its epsilon may be [n].
      key: for the noise. Each example draws from its own key.
      samples: how many points; each costs a forward pass.
      targeted: look for points that are classified as y.

    Returns:
      `AttackResult`: the adversarial sample of the highest margin loss, or the sample of the
      highest one where none is adversarial (of the lowest, if targeted).

    Raises:
      ValueError: labels that do not fit, images out of bounds or NaN, samples below 1.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x[:, 0], x[:, 1]], axis=1)
      >>> result = advmeta.attacks.uniform_noise(
      ...     logits_fn, jnp.array([[0.6, 0.5], [0.8, 0.5]]), jnp.array([0, 0]),
      ...     threat_model=advmeta.ThreatModel("linf", epsilon=0.1), key=jax.random.key(0))
      >>> result.is_adversarial.tolist()
      [True, False]

    Reference:
      Carlini et al. 2019, On Evaluating Adversarial Robustness, section 4.3. arXiv:1902.06705
    """
    check_counts(samples=samples)
    x, y = check_attack_inputs(logits_fn, x, y, threat_model)
    logits_fn = as_partial(logits_fn)
    return _noise(
        logits_fn, x, y, threat_model, key, samples=samples, targeted=targeted, gaussian=False
    )


def gaussian_noise(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    threat_model: ThreatModel,
    key: Key,
    samples: int = 100,
    targeted: bool = False,
) -> AttackResult:
    """The worst of several Gaussian perturbations of about the norm epsilon.

    ``argmax_s L(f(P(x + g_s)), y),  g_s ~ N(0, sigma^2 I)``

    where P projects onto the ball and the bounds and sigma is epsilon for linf, for l2
    ``epsilon / sqrt(d)`` with d values an example, and for l1 ``epsilon / (d sqrt(2 / pi))``, which
    puts the norm at epsilon or a little off.
    Arguments, result and errors are those of `uniform_noise`.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x[:, 0], x[:, 1]], axis=1)
      >>> result = advmeta.attacks.gaussian_noise(
      ...     logits_fn, jnp.array([[0.6, 0.5], [0.8, 0.5]]), jnp.array([0, 0]),
      ...     threat_model=advmeta.ThreatModel("l2", epsilon=0.1), key=jax.random.key(0))
      >>> result.is_adversarial.tolist()
      [True, False]

    Reference:
      Carlini et al. 2019, On Evaluating Adversarial Robustness, section 4.3. arXiv:1902.06705
    """
    check_counts(samples=samples)
    x, y = check_attack_inputs(logits_fn, x, y, threat_model)
    logits_fn = as_partial(logits_fn)
    return _noise(
        logits_fn, x, y, threat_model, key, samples=samples, targeted=targeted, gaussian=True
    )


@jax.jit(static_argnames=("samples", "targeted", "gaussian"))
def _noise(
    logits_fn: Partial, x, y, threat_model, key, *, samples, targeted, gaussian
) -> AttackResult:
    keys = example_keys(key, x)
    sign = -1.0 if targeted else 1.0
    d = x[0].size
    expected = {"linf": 1.0, "l2": d**0.5, "l1": d * (2 / np.pi) ** 0.5}[threat_model.norm]
    sigma = threat_model.radius(x) / expected

    def draw(sample_keys):
        if not gaussian:
            return threat_model.random_start(sample_keys, x)
        normal = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(sample_keys)
        return threat_model.project(x + sigma * normal, x)

    def sample(best, index):
        x_s = draw(fold(keys, index))
        logits = logits_fn(x_s)
        is_adversarial = losses.is_right(logits, y) == targeted
        new = AttackResult(x_s, is_adversarial, sign * losses.margin(logits, y))
        return better(new, best), None

    n = x.shape[0]
    worst = AttackResult(x, jnp.zeros(n, bool), jnp.full(n, -jnp.inf, x.dtype))
    best, _ = jax.lax.scan(sample, worst, jnp.arange(samples))
    return best._replace(loss=sign * best.loss)
