"""What can be asked of a model without attacking it: its outputs, its gradients, its program."""

import warnings
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.tree_util import Partial

from advmeta.attacks import losses
from advmeta.attacks.batching import fold
from advmeta.attacks.threat_model import ThreatModel, example_keys
from advmeta.types import Array, Key, LogitsFn

PASSES = 5  # of AutoAttack, check_randomized
DIRECTIONS = 100  # of Pintor et al. 2022, as is the next
NEIGHBOURHOOD = 4 / 255  # of the width of the bounds, to each side

# A loop may be an optimisation, the next six have a gradient that is zero or not theirs, and the
# others draw random numbers or leave JAX.
SUSPICIOUS = {
    "while", "scan",
    "stop_gradient", "custom_vjp_call", "round", "floor", "ceil", "sign",
    "random_bits", "threefry2x32", "pure_callback", "io_callback",
}  # fmt: skip
# What a softmax does to a maximum between finding and subtracting it.
RESHAPING = {"max", "select_n", "broadcast_in_dim", "reshape"}


@jax.jit
def logits_of(logits_fn: Partial, x: Array) -> Array:
    return logits_fn(x)


def direction(logits) -> np.ndarray:
    """Rows of logits at unit length, as AutoAttack compares them; in float64, [n, k]."""
    logits = np.asarray(logits, np.float64)
    return logits / (np.linalg.norm(logits, axis=1, keepdims=True) + 1e-10)


def repeated(logits_fn: LogitsFn, x: Array) -> float:
    """The largest difference among several passes over the same x, each row of unit length.

    Where predictions change, the share of them at least.

    Nothing is compiled as a whole here: a model that draws with Python's or numpy's generator
    would always draw the same in a compiled program.
    """
    rows = [direction(logits_fn(x)) for _ in range(PASSES)]
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[:i]]
    changed = [(a.argmax(axis=1) != b.argmax(axis=1)).mean() for a, b in pairs]
    return float(np.max([*changed, *(np.linalg.norm(a - b, axis=1).max() for a, b in pairs)]))


def batch_dependence(logits_fn: Partial, x: Array) -> float:
    """The largest difference between x as one batch and as two of other sizes, in unit rows."""
    whole = direction(logits_of(logits_fn, x))
    # The copy is what would be read from a file. The second part is not aligned with the first.
    copy = np.array(x)
    cut = max(len(copy) // 3, 1)
    parts = [part for part in (copy[:cut], copy[cut:]) if len(part)]
    apart = np.concatenate([direction(logits_of(logits_fn, jnp.asarray(part))) for part in parts])
    return float(np.linalg.norm(whole - apart, axis=1).max())


def are_probabilities(logits) -> np.ndarray:
    """Which rows could come from a softmax, by AutoAttack's tolerance, [n]."""
    logits = np.asarray(logits)
    in_range = (logits < 1 + 1e-5).all(axis=1) & (logits > -1e-5).all(axis=1)
    return in_range & (np.abs(logits.sum(axis=1) - 1) < 1e-5)


def warn_of_probabilities(logits) -> None:
    """Warns whoever called the function that calls this, where all rows are probabilities."""
    if are_probabilities(logits).all():
        warnings.warn(
            "check softmax_output: logits_fn returns probabilities. Attacks need logits: a softmax "
            "hides gradients, and robustness would be overstated. Leave it out",
            stacklevel=3,
        )


def suspicious_primitives(logits_fn: LogitsFn, x: Array) -> list[str]:
    """What the model's program does that a plain network does not, such as "round (2)"."""
    counts = Counter(_primitives(jax.make_jaxpr(logits_fn)(x).jaxpr))
    return [f"{name} ({counts[name]})" for name in sorted(SUSPICIOUS & counts.keys())]


def _primitives(jaxpr):
    maxima = set()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        of_a_maximum = not maxima.isdisjoint(map(id, equation.invars))
        if name == "reduce_max" or (of_a_maximum and name in RESHAPING):
            maxima.update(map(id, equation.outvars))
        # A stable softmax stops the gradient of the maximum that it subtracts; rightly, as the
        # result does not depend on what is subtracted.
        if not (name == "stop_gradient" and of_a_maximum):
            yield name
        for inner in jaxprs_in_params(equation.params):
            yield from _primitives(inner)


@jax.jit
def useless_gradients(logits_fn: Partial, x: Array, y: Array) -> Array:
    """Where the gradient of the cross-entropy or the DLR is zero, NaN or infinite, [n].

    Zero counts where the example is classified correctly: else the DLR may well be constant.
    """
    correct = logits_fn(x).argmax(axis=-1) == y
    useless = jnp.zeros(y.shape, bool)
    for loss in (losses.cross_entropy, losses.dlr):
        gradient = jax.grad(lambda x, loss=loss: loss(logits_fn(x), y).sum())(x)
        size = jnp.abs(gradient).reshape(len(x), -1).sum(axis=1)
        useless |= (correct & (size == 0)) | ~jnp.isfinite(size)
    return useless


@jax.jit
def gradient_error(logits_fn: Partial, x: Array, threat_model: ThreatModel, key: Key) -> Array:
    """How far the gradient is from saying what a step of epsilon / 2 does, 0 to 2, [].

    ``sum_i |2 <g_i, d_i> - (s(x_i + d_i) - s(x_i - d_i))| / max of the sums of either's size``

    s is a random combination of the logits, g its gradient and d a random direction. A step of that
    size crosses the stairs of a quantised model, which a small one would not notice.
    """
    width = threat_model.bounds[1] - threat_model.bounds[0]
    noise_key, weight_key = jax.random.split(key)
    noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(
        example_keys(noise_key, x)
    )
    step = jnp.minimum(threat_model.radius(x), width / 2) / 2
    d = step * threat_model.steepest(noise)
    # From here both ends of the step are images.
    centre = jnp.clip(x, threat_model.bounds[0] + jnp.abs(d), threat_model.bounds[1] - jnp.abs(d))
    classes = jax.eval_shape(logits_fn, x).shape[1]
    weight = jax.random.normal(weight_key, (classes,), x.dtype)
    gradient = jax.grad(lambda x: (logits_fn(x) @ weight).sum())(centre)
    predicted = 2 * (gradient * d).reshape(len(x), -1).sum(axis=1)
    actual = (logits_fn(centre + d) - logits_fn(centre - d)) @ weight
    size = jnp.maximum(jnp.abs(predicted).sum(), jnp.abs(actual).sum())
    return jnp.abs(predicted - actual).sum() / jnp.maximum(size, 1e-30)


@partial(jax.jit, static_argnums=3)
def instability(
    logits_fn: Partial, x: Array, y: Array, bounds: tuple[float, float], key: Key
) -> Array:
    """How much the margin changes very near to x, relative to its size and at most 1, [].

    ``sum_{i,s} |L(x_i + u_is) - L(x_i)| / sum_{i,s} |L(x_i)|``

    Pintor et al. take the attack's loss; the margin does not depend on the logits' scale.
    """
    reach = NEIGHBOURHOOD * (bounds[1] - bounds[0])
    keys = example_keys(key, x)
    reference = losses.margin(logits_fn(x), y)

    def change(total, index):
        noise = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype, -reach, reach))(
            fold(keys, index)
        )
        near = losses.margin(logits_fn(jnp.clip(x + noise, *bounds)), y)
        return total + jnp.abs(near - reference).sum(), None

    total, _ = jax.lax.scan(change, jnp.zeros([], x.dtype), jnp.arange(DIRECTIONS))
    size = DIRECTIONS * jnp.abs(reference).sum()
    return jnp.minimum(total / jnp.maximum(size, 1e-30), 1.0)
