"""What an attack raises: cross-entropy, the margin, and the difference of logits ratio (DLR).

Every loss is per example, larger where the example is closer to being misclassified. The plain ones
take ``(logits [n, k], y [n])``; those towards a class take ``(logits, y, target [n])`` as well.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax

from advmeta.attacks.validation import Note
from advmeta.types import Array

Loss = Callable[[Array, Array], Array]  # (logits [n, k], y [n]) -> [n]
TargetedLoss = Callable[[Array, Array, Array], Array]  # (logits [n, k], y [n], target [n]) -> [n]

cross_entropy = optax.softmax_cross_entropy_with_integer_labels

# The reference adds this to the denominators of the DLR, which are 0 where logits are equal.
_TINY = 1e-12


def is_right(logits: Array, labels: Array) -> Array:
    """Whether the label has the largest logit, bool [n]; never where a logit is NaN.

    An argmax takes NaN for the largest: a model that has diverged would be right about all examples
    of a class.
    """
    return (logits.argmax(axis=-1) == labels) & ~jnp.isnan(logits).any(axis=-1)


def margin(logits: Array, y: Array) -> Array:
    """``max_{i != y} z_i - z_y``: positive exactly where the example is misclassified, [n].

    Example:
      >>> advmeta.attacks.losses.margin(jnp.array([[1.0, 3.0, 2.5]]), jnp.array([1])).tolist()
      [-0.5]

    Reference:
      Carlini and Wagner 2017, Towards Evaluating the Robustness of Neural Networks, f_6 in section
      V-A. arXiv:1608.04644
    """
    return _strongest_other(logits, y) - _pick(logits, y)


def dlr(logits: Array, y: Array) -> Array:
    """The margin, made invariant to shifts and scales of the logits, [n].

    ``DLR(z, y) = -(z_y - max_{i != y} z_i) / (z_pi1 - z_pi3)``

    where ``pi`` sorts the logits in decreasing order. With two classes there is no z_pi3 and this
    is `margin`.

    Example:
      >>> advmeta.attacks.losses.dlr(jnp.array([[1.0, 3.0, 2.5]]), jnp.array([1])).tolist()
      [-0.25]

    Reference:
      Croce and Hein 2020, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
      Parameter-free Attacks, section 4. arXiv:2003.01690
    """
    if logits.shape[-1] < 3:
        return margin(logits, y)
    top, _ = jax.lax.top_k(logits, 3)
    return _ratio(margin(logits, y), top[:, 0] - top[:, 2] + _TINY)


def targeted_cross_entropy(logits: Array, y: Array, target: Array) -> Array:
    """``log softmax(z)_target``, [n]."""
    del y
    return -cross_entropy(logits, target)


def targeted_margin(logits: Array, y: Array, target: Array) -> Array:
    """``z_target - z_y``, [n]: the surrogate of MultiTargeted (Gowal et al. 2019)."""
    return _pick(logits, target) - _pick(logits, y)


def targeted_dlr(logits: Array, y: Array, target: Array) -> Array:
    """The DLR towards one class, [n].

    ``DLR(z, y, t) = -(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2)``

    With fewer than four classes there is no z_pi4 and this is `targeted_margin`.

    Example:
      >>> z, y, target = jnp.array([[4.0, 3.0, 1.0, 1.0]]), jnp.array([0]), jnp.array([1])
      >>> round(float(advmeta.attacks.losses.targeted_dlr(z, y, target)[0]), 4)  # -1 / 3
      -0.3333

    Reference:
      Croce and Hein 2020, section 4. arXiv:2003.01690
    """
    if logits.shape[-1] < 4:
        return targeted_margin(logits, y, target)
    top, _ = jax.lax.top_k(logits, 4)
    denominator = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + _TINY
    return _ratio(targeted_margin(logits, y, target), denominator)


PLAIN = {"ce": cross_entropy, "dlr": dlr, "margin": margin}
TOWARDS_A_CLASS = {
    "ce": targeted_cross_entropy,
    "dlr": targeted_dlr,
    "margin": targeted_margin,
}


def resolve(loss: str | Callable, classes: int, *, towards_a_class: bool) -> tuple[Callable, Note]:
    """The function that a loss's name stands for, and a note where it falls back to the margin.

    A function is returned as it is.

    Raises:
      ValueError: unknown name.
    """
    table = TOWARDS_A_CLASS if towards_a_class else PLAIN
    if callable(loss):
        return loss, Note()
    if loss not in table:
        raise ValueError(f"loss={loss!r} is unknown; write one of {list(table)} or a function")
    needed = 4 if towards_a_class else 3
    if loss == "dlr" and classes < needed:
        return table["margin"], Note(
            f"the {'targeted ' * towards_a_class}DLR loss needs {needed} classes and the model has "
            f"{classes}: used the margin loss instead"
        )
    return table[loss], Note()


def check_ranks(ranks: Iterable[int], classes: int) -> tuple[list[int], Note]:
    """The target ranks that the model has classes for, and a note where some were left out.

    Rank 2 is the strongest class but one of the clean logits, rank ``classes`` the weakest.

    Raises:
      ValueError: no rank, or one below 2.
    """
    ranks = [int(rank) for rank in ranks]
    if not ranks or min(ranks) < 2:
        raise ValueError(
            f"target_ranks={ranks} must hold at least one rank, each at least 2: rank 1 is the "
            "class that the model predicts; range(2, 11) are the nine of AutoAttack"
        )
    kept = [rank for rank in ranks if rank <= classes]
    if not kept:
        raise ValueError(f"target_ranks={ranks} but the model has only {classes} classes")
    left_out = len(ranks) - len(kept)
    return kept, Note(
        f"the model has {classes} classes: left out {left_out} target ranks above" * (left_out > 0)
    )


def target_of_rank(logits_clean: Array, rank: Array) -> Array:
    """The class of that rank (1 = the predicted one) for each example, [n]."""
    # An ascending stable sort read from the end, as the reference does, settles ties its way.
    return jnp.argsort(logits_clean, axis=-1)[:, -rank]


@jax.custom_jvp
def _ratio(a: Array, b: Array) -> Array:
    """``a / b`` with a derivative that is exactly 0 where a and b are the same number.

    So is the DLR's where y is the third class: it is 1 around there. JAX's own rule, a b^-2, leaves
    rounding noise, and an attack that takes the sign of the gradient would follow it.
    """
    return a / b


@_ratio.defjvp
def _ratio_jvp(primals, tangents):
    (a, b), (da, db) = primals, tangents
    ratio = a / b
    return ratio, (da - ratio * db) / b


def _pick(logits: Array, classes: Array) -> Array:
    # A masked sum, not a gather: its gradient is a product, where a gather's is a slow scatter.
    return jnp.where(_one_hot(logits, classes), logits, 0.0).sum(axis=-1)


def _strongest_other(logits: Array, y: Array) -> Array:
    return jnp.where(_one_hot(logits, y), -jnp.inf, logits).max(axis=-1)


def _one_hot(logits: Array, classes: Array) -> Array:
    return jnp.arange(logits.shape[-1]) == classes[:, None]
