"""What every attack checks at the door, outside of compiled code."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial

from advmeta.attacks.threat_model import ThreatModel
from advmeta.types import Array, Batch, Key, LogitsFn


@jax.tree_util.register_static
class Note(str):
    """Text for a person; static to JAX, so that it passes through `jax.jit` and `jax.vmap`."""

    __slots__ = ()


class AttackResult(NamedTuple):
    """What an attack found for each example."""

    x_adv: Array  # [n, ...], in the ball and in bounds
    is_adversarial: Array  # [n] bool: misclassified (untargeted), or classified as y (targeted)
    loss: Array  # [n]: the attack's loss at x_adv
    distance: Array | None = None  # [n], of minimum-norm attacks: also beyond epsilon
    note: Note = Note("")  # what the attack did otherwise than asked, e.g. for want of classes


def as_partial(logits_fn: LogitsFn) -> Partial:
    """Makes a function a pytree, so that it passes through `jax.jit` as an argument.

    Attacks are compiled once a function object. ``Partial(apply, params)`` is compiled once for
    all values of ``params``. Its logits are in x's dtype: attacks compare losses, and in half
    precision many are equal.
    """
    model = logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn)
    return model if model.func is _like_x else Partial(_like_x, model)


def _like_x(model: Partial, x: Array, *key: Key) -> Array:
    logits = model(x, *key)
    # What is no array `check_attack_inputs` refuses.
    return logits.astype(x.dtype) if hasattr(logits, "astype") else logits


def check_attack_inputs(logits_fn: LogitsFn, x, y, threat_model: ThreatModel) -> Batch:
    """Returns x as float32 and y as int32, or raises a ValueError that says what to write instead.

    Values are checked only where they are known: inside a `jax.jit` or `jax.vmap` shapes and dtypes
    are all there is to look at.
    """
    x, y = check_batch(x, y, threat_model.bounds)
    if jnp.shape(threat_model.epsilon) not in ((), y.shape):
        raise ValueError(
            f"epsilon has shape {jnp.shape(threat_model.epsilon)}; it must be one number, "
            f"or one an example: shape {y.shape}"
        )
    logits = _logits_shape(logits_fn, x)
    if not hasattr(logits, "shape") or len(logits.shape) != 2 or logits.shape[0] != x.shape[0]:
        raise ValueError(
            f"logits_fn gave {getattr(logits, 'shape', type(logits))} for x of shape {x.shape}; it "
            f"must give one row of logits an example, shape ({x.shape[0]}, classes)"
        )
    _check_label_range(y, logits.shape[1])
    return Batch(x, y)


def _logits_shape(logits_fn: LogitsFn, x: Array):
    try:
        return jax.eval_shape(logits_fn, x)
    except (TypeError, ValueError) as error:  # as JAX raises them for shapes that do not fit
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"logits_fn fails on x of shape {x.shape} and dtype {x.dtype}: {reason}; is it a model "
            "of such examples?"
        ) from error


def check_batch(x, y, bounds: tuple[float, float]) -> Batch:
    """Checks examples and labels without a model; see `check_attack_inputs`."""
    x, y = check_arrays(x, y)
    if y.ndim != 1 or y.shape[0] == 0:
        raise ValueError(
            f"x has shape {x.shape}; it must be a batch [n, ...] with at least one example: "
            "for a single one write x[None]"
        )
    if not isinstance(x, Tracer):
        _check_values(np.asarray(x), bounds)
    # Integer images would pass a [0, 1] check only as 0s and 1s; attacks need floats all the same,
    # and half precision would lose their smaller steps.
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
    dtype = jax.dtypes.canonicalize_dtype(jnp.promote_types(dtype, jnp.float32))
    return Batch(jnp.asarray(x, dtype), jnp.asarray(y, jnp.int32))


def check_arrays(x, y) -> tuple[np.ndarray | Array, np.ndarray | Array]:
    """Checks what can be said without bounds and a model; x [..., n, ...] may be many batches.

    Returns:
      x and y as they are, on the host or on a device, whatever was a list as a NumPy array.

    Raises:
      ValueError: x or y is no array of numbers, x holds none, y is not of an integer dtype or does
        not belong to x.
    """
    x, y = _numbers(x, "x"), _numbers(y, "labels")
    if not (jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.kind in "iub"):
        raise ValueError(f"x has dtype {x.dtype}; it must hold real numbers, such as float32")
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(
            f"labels have dtype {y.dtype}; they must be class numbers of an integer dtype: "
            "y.astype('int32'), or y.argmax(-1) if they are one-hot"
        )
    if x.ndim < 2 or x.size == 0:
        raise ValueError(
            f"x has shape {x.shape}; it must be a batch [n, ...] with at least one example: "
            "for a single one write x[None]"
        )
    if y.ndim == 0 or y.ndim >= x.ndim or x.shape[: y.ndim] != y.shape:
        raise ValueError(f"x has {x.shape[0]} examples but labels have shape {y.shape}")
    return x, y


def _numbers(value, what: str) -> np.ndarray | Array:
    """A JAX array as it is, anything else as NumPy sees it."""
    if isinstance(value, jax.Array):
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{what} cannot be made an array: {error}") from error
    if array.dtype.kind not in "fiubc" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{what} is of type {type(value).__name__} and dtype {array.dtype}; it must be an "
            "array of numbers"
        )
    if (
        array.dtype.kind in "iu"
        and array.dtype.itemsize >= 4
        and array.size
        and not -(2**31) <= array.min() <= array.max() < 2**31
    ):
        raise ValueError(f"{what} holds numbers up to {array.max()}: JAX would cut them to 32 bits")
    return array


def _check_values(x: np.ndarray, bounds: tuple[float, float]) -> None:
    if np.isnan(x).any():
        raise ValueError(
            f"x has {np.isnan(x).any(axis=tuple(range(1, x.ndim))).sum()} examples "
            "with NaN; remove them: no attack can say anything about them"
        )
    if x.min() < bounds[0] or x.max() > bounds[1]:
        raise ValueError(
            f"x has values in [{x.min():g}, {x.max():g}], outside the threat model's bounds "
            f"{bounds}: divide 8-bit images by 255, or give ThreatModel(bounds=...) that fit"
        )


def _check_label_range(y: Array, classes: int) -> None:
    if isinstance(y, Tracer):
        return
    labels = np.asarray(y)  # inside a jit even the minimum of a known array is traced
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels lie in [{labels.min()}, {labels.max()}] but the model has {classes} classes, "
            f"0 to {classes - 1}"
        )
