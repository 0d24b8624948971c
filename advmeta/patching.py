"""Patch a trained model: some more steps on a little clean data, by a meta-optimizer."""

import functools
import os
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from advmeta.attacks.losses import is_right
from advmeta.attacks.threat_model import ThreatModel
from advmeta.attacks.validation import check_attack_inputs
from advmeta.held_out import Accuracy, held_out_accuracy
from advmeta.imports import is_import_name
from advmeta.meta_optimizer.layers import unboxed
from advmeta.meta_optimizer.pretrained import (
    load_card,
    load_meta_optimizer,
    outside_of,
    untested_on,
)
from advmeta.meta_optimizer.transform import at_least_float32
from advmeta.notebook import html_table
from advmeta.tasks import Task, aim_at, take
from advmeta.types import Array, Batch, Key, Optimizee, Params, PyTree
from advmeta.unroll import InnerState, unroll

# Trained weights are larger than those that a meta-optimizer meets in its training. Where
# activations are piecewise linear, a model with smaller weights predicts nearly the same.
SHRINK = 0.7
# Of the weights in the average: that of step t is proportional to about t^3.
AVERAGING_POWER = 3
CHECKS = 20  # how often the average is held against the allowed drop
# What a normalisation has counted of its inputs, and descent is no business of.
STATISTICS = ("mean", "var")
HELD_OUT_SHARE = 5  # one example of so many is held out, if nothing else is


class PatchReport(NamedTuple):
    """What a patch did, and what it cost."""

    before: Accuracy  # clean and robust, on the held-out examples
    after: Accuracy
    distance: float  # ||patched - params|| / ||params||, over all that was patched
    steps: int  # behind the parameters returned; 0 if they are the ones given
    gradient_evaluations: int  # of a batch, forward and backward; none is of adversarial examples
    seconds: float  # of everything, the accuracies and compiling included
    note: str  # what a user should know, else ""

    def _repr_html_(self) -> str:
        rows = (("before", *self.before), ("after", *self.after))
        cost = (
            f"{self.steps} steps, {self.gradient_evaluations} gradient evaluations, "
            f"{self.seconds:.1f} s; the parameters moved by {self.distance:.1%}"
        )
        note = ". ".join(filter(None, (cost, self.note)))
        return html_table(("", "clean accuracy", "robust accuracy"), rows, note)


def patch(
    apply: Callable[[Params, Array], Array],
    params: Params,
    x: Array,
    y: Array,
    *,
    threat_model: ThreatModel,
    key: Key,
    meta_optimizer: str | os.PathLike[str] | optax.GradientTransformation = "mixture",
    steps: int | None = None,
    held_out: tuple[Array, Array] | None = None,
    max_clean_drop: float | None = None,
    batch_size: int | None = None,
) -> tuple[Params, PatchReport]:
    """Makes a trained model more robust with a meta-optimizer and a little clean data.

    ``theta_0 = 0.7 theta,  theta_{t+1} = theta_t + u_t,
    average_t = average_{t-1} + 4 / (t + 3) (theta_t - average_{t-1})``

    where u_t is the meta-optimizer's update for the gradient of the clean cross-entropy. Returned
    is the average of the last step; with ``max_clean_drop``, of the last step at which the average
    lost no more than that. No adversarial example is made but to measure accuracies.

    Args:
      apply: (params, x [n, ...]) -> logits [n, k].
      params: any pytree: nested dicts of Flax or Haiku, an Equinox module, a Flax NNX state. Its
        floating-point arrays are patched, but not those in the collection ``batch_stats`` or called
        ``mean`` or ``var``, which a normalisation counts; everything else stays as it is.
      x: clean examples [n, ...] in the threat model's bounds; a few hundred will do.
      y: their labels [n].
      threat_model: what the model is to withstand, with one epsilon: the meta-optimizer is told
        it, and the accuracies are measured in it.
      key: for the split, the batches and the attack of the accuracies.
      meta_optimizer: a name of `list_pretrained`, a .safetensors file, or any optax optimizer.
      steps: inner steps; by default the longest episode of the meta-optimizer's training.
      held_out: (x, y) to measure on; by default a fifth of the examples, which then is not
        trained on. Those that the model was trained on make its accuracy before look too good.
      max_clean_drop: the most that held-out clean accuracy may fall, such as 0.03.
      batch_size: examples a step; by default 128, or as many as there are, but at least 64.

    Returns:
      The patched parameters, of the same structure, and a `PatchReport`.

    Raises:
      ValueError: labels that do not fit, images out of bounds or NaN, no floating-point parameters,
        fewer examples than ``batch_size``, steps below 1, a max_clean_drop below 0, an epsilon an
        example, or steps missing where the meta-optimizer does not say how long it was trained.

    Example:
      >>> digits = advmeta.data.load("digits")
      >>> threat_model = advmeta.ThreatModel("linf", 0.1)
      >>> task = advmeta.Task(digits.train, digits.test, threat_model, advmeta.optimizees.mlp())
      >>> params, _ = advmeta.train(task, optax.adam(1e-2), jax.random.key(0), steps=200)
      >>> patched, report = advmeta.patch(
      ...     task.optimizee.apply, params, digits.train.x[:500], digits.train.y[:500],
      ...     threat_model=threat_model, held_out=digits.test, key=jax.random.key(1))
      >>> bool(report.after.robust > report.before.robust + 0.15)
      True
      >>> bool(report.after.clean > report.before.clean - 0.05)
      True
    """
    start = time.perf_counter()
    optimizer, steps, note = _resolve(meta_optimizer, steps, threat_model)
    if max_clean_drop is not None and max_clean_drop < 0:
        raise ValueError(f"max_clean_drop={max_clean_drop} must be at least 0, such as 0.03")
    if jnp.ndim(threat_model.epsilon):
        raise ValueError(
            f"threat_model.epsilon has shape {jnp.shape(threat_model.epsilon)}: a model is patched "
            "for one epsilon, write a number"
        )
    check = functools.partial(
        check_attack_inputs, Partial(apply, params), threat_model=threat_model
    )
    x, y = check(x, y)
    held_out = None if held_out is None else check(*held_out)
    split_key, patch_key, attack_key = jax.random.split(key, 3)
    train, held_out = _split(Batch(x, y), held_out, split_key)
    if batch_size is None:
        batch_size = min(128, max(64, len(train.y)))
    trainable, apply_trainable = _floating_part(apply, params)
    task = Task(train, held_out, threat_model, Optimizee(_no_init, apply_trainable),
                batch_size)  # fmt: skip
    allowed = jnp.inf if max_clean_drop is None else max_clean_drop
    kept, taken = _patch(task, trainable, patch_key, allowed, optimizer=optimizer, steps=steps)
    before, after = (jax.tree.map(float, _accuracy(task, p, attack_key)) for p in (trainable, kept))
    difference = jax.tree.map(jnp.subtract, kept, trainable)
    notes = [note, _outcome(int(taken), steps, max_clean_drop)]
    report = PatchReport(
        before, after, float(optax.tree.norm(difference) / optax.tree.norm(trainable)),
        int(taken), steps, time.perf_counter() - start, "; ".join(filter(None, notes)),
    )  # fmt: skip
    return _merge(kept, params), report


class Averaged(NamedTuple):
    """The state of an optimizer that also averages the parameters it makes."""

    inner: optax.OptState
    average: Params
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  # optax's name


def with_average(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same updates; its state has the polynomially weighted average of the parameters.

    Reference:
      Shamir and Zhang 2013, Stochastic Gradient Descent for Non-smooth Optimization: Convergence
      Results and Optimal Averaging Schemes, section 4. arXiv:1212.1824
    """

    def init(params: Params) -> Averaged:
        average = jax.tree.map(at_least_float32, params)  # in 16 bits it soon takes in nothing more
        return Averaged(optimizer.init(params), average, jnp.zeros([], jnp.int32))

    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates, state, params: Params = None, **extra_args):
        updates, inner = optimizer.update(updates, state.inner, params, **extra_args)
        count = state.count + 1
        weight = (AVERAGING_POWER + 1) / (count + AVERAGING_POWER)
        now = optax.apply_updates(params, updates)
        average = optax.incremental_update(now, state.average, weight)
        return updates, Averaged(inner, average, count)

    return optax.GradientTransformationExtraArgs(init, update)


@functools.partial(jax.jit, static_argnames=("optimizer", "steps"))
def _patch(
    task: Task, params: Params, key: Key, allowed: Array, *, optimizer, steps: int
) -> tuple[Params, Array]:
    """The last average that is finite and lost no more than allowed, and the steps behind it."""
    x, y = task.held_out

    def clean_accuracy(params: Params) -> Array:
        return is_right(task.optimizee.apply(params, x), y).mean()

    before, averaging = clean_accuracy(params), with_average(optimizer)
    checks = min(CHECKS, steps)

    def piece(carry, _):
        state, kept, taken = carry
        state, _ = unroll(task, averaging, state, key, steps=steps // checks)
        average = optax.tree.cast_like(state.opt_state.average, state.params)
        # A drop of exactly what is allowed is allowed: shares of a count are not exact.
        good = before - clean_accuracy(average) <= allowed + 1e-6
        good = good & jnp.isfinite(optax.tree.norm(average))
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), average, kept)
        return (state, kept, jnp.where(good, state.step, taken)), None

    start = jax.tree.map(lambda p: SHRINK * p, params)
    zero = jnp.zeros([], jnp.int32)
    state = InnerState(start, averaging.init(start), zero)
    if rest := steps % checks:
        state, _ = unroll(task, averaging, state, key, steps=rest)
    (_, kept, taken), _ = jax.lax.scan(piece, (state, params, zero), length=checks)
    return kept, taken


@jax.jit
def _accuracy(task: Task, params: Params, key: Key) -> Accuracy:
    return held_out_accuracy(task, params, key)


def _resolve(
    meta_optimizer, steps: int | None, threat_model: ThreatModel
) -> tuple[optax.GradientTransformation, int, str]:
    """The optimizer, its steps, and what is said of a use that its training did not cover."""
    if not isinstance(meta_optimizer, optax.GradientTransformation) and is_import_name(
        str(meta_optimizer)
    ):
        meta_optimizer = load_meta_optimizer(meta_optimizer)
    if isinstance(meta_optimizer, optax.GradientTransformation):
        if steps is None:
            raise ValueError("steps=None is for a pretrained meta-optimizer: write steps=200, say")
        optimizer, notes = meta_optimizer, []
    else:
        card = load_card(meta_optimizer)
        if steps is None and "training" not in card:
            raise ValueError(
                f"steps=None, and the card of {str(meta_optimizer)!r} does not say how long its "
                "trainings were: write steps=200, say"
            )
        steps = int(card["training"]["horizon"][1]) if steps is None else steps
        aim = aim_at(threat_model, steps)
        notes = outside_of(card, meta_optimizer, aim)
        notes += untested_on(card, meta_optimizer, ["clean"])
        with warnings.catch_warnings():  # the report says it
            warnings.simplefilter("ignore", UserWarning)
            optimizer = load_meta_optimizer(meta_optimizer, aim)
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    return optimizer, steps, "; ".join(notes)


def _outcome(taken: int, steps: int, max_clean_drop: float | None) -> str:
    if taken == steps:
        return ""
    why = "were not finite"
    if max_clean_drop is not None:
        why = f"lost more than {max_clean_drop:g} of clean accuracy"
    if taken == 0:
        return f"the parameters are as they were given: all others {why}"
    return f"stopped after {taken} of {steps} steps: later parameters {why}"


def _split(examples: Batch, held_out: Batch | None, key: Key) -> tuple[Batch, Batch]:
    if held_out is not None:
        return examples, held_out
    n = len(examples.y)
    if n < HELD_OUT_SHARE:
        raise ValueError(f"{n} examples are too few to hold some out; give held_out=(x, y)")
    order = jax.random.permutation(key, n)
    cut = n // HELD_OUT_SHARE
    return take(examples, order[cut:]), take(examples, order[:cut])


def _floating_part(apply, params: PyTree) -> tuple[PyTree, Callable]:
    """The parameters with None for whatever is not to be patched, and apply for the others."""

    def keep(path, leaf):
        names = [getattr(part, "key", getattr(part, "name", None)) for part in unboxed(path)]
        if "batch_stats" in names or (names and names[-1] in STATISTICS):
            return None
        is_floating = isinstance(leaf, jax.typing.ArrayLike) and jnp.issubdtype(
            jnp.result_type(leaf), jnp.floating
        )
        return jnp.asarray(leaf) if is_floating and hasattr(leaf, "shape") else None

    trainable = jax.tree_util.tree_map_with_path(keep, params)
    if not jax.tree.leaves(trainable):
        raise ValueError("params hold no floating-point array: there is nothing to patch")
    return trainable, lambda trainable, x: apply(_merge(trainable, params), x)


def _merge(trainable: PyTree, params: PyTree) -> PyTree:
    """params with the arrays of ``trainable`` where it has any."""
    leaves, structure = jax.tree.flatten(params)
    new = structure.flatten_up_to(trainable)
    merged = [old if leaf is None else leaf for leaf, old in zip(new, leaves, strict=True)]
    return structure.unflatten(merged)


def _no_init(key, x_shape):
    raise NotImplementedError("a model that is patched has its parameters")
