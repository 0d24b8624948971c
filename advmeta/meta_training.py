"""The outer loop: outer steps, and now and then a look at how well the meta-optimizer does."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from advmeta import inner_gradients
from advmeta.attacks.validation import check_attack_inputs
from advmeta.held_out import Accuracy, held_out_accuracy
from advmeta.meta_optimizer.pretrained import weights_path
from advmeta.meta_optimizer.transform import (
    check_meta_params,
    is_beyond_nominal,
    scale_by_meta_optimizer,
)
from advmeta.meta_optimizer.weights import load_weights
from advmeta.meta_training_config import MetaTrainingConfig
from advmeta.outer_step import OuterInfo, OuterState, init_outer, outer_steps
from advmeta.sharding import check_mesh, lay_out, on_every_device
from advmeta.task_families import TaskFamily
from advmeta.tasks import aim_at
from advmeta.types import Array, Key, MetaParams
from advmeta.unroll import train, with_replay

HOPELESS = 50  # so many outer steps in a row without a finite meta-gradient end a training


class TrainingState(NamedTuple):
    """Where a meta-training stands."""

    outer: OuterState
    best: MetaParams  # the averages that did best on the selection tasks so far
    best_robust: Array  # [] what they did; -1 before the first evaluation
    history: tuple[dict[str, Any], ...]  # see `meta_train`


def meta_train(
    config: MetaTrainingConfig,
    *,
    key: Key,
    families: tuple[TaskFamily, ...] | None = None,
    selection: tuple[TaskFamily, ...] | None = None,
    outer_optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> tuple[MetaParams, list[dict[str, Any]]]:
    """Meta-trains a meta-optimizer.

    Outer step: every lane runs ``truncation`` inner steps from where it stands;
    ``phi <- phi - outer_optimizer( d/dphi mean_lanes meta_loss )``. Lanes that have come to their
    horizon start a new episode on a new task. First horizons are staggered, so that lanes are at
    different places of their episodes.

    Args:
      config: see `MetaTrainingConfig`.
      key: the same key gives the same weights, bit for bit on the same devices.
      families: task families to use instead of ``config.tasks``, for one's own data and models.
      selection: families to use instead of ``config.selection``.
      outer_optimizer: any optax optimizer instead of clipped Adam with a cosine schedule.
      mesh: devices to split the lanes over, along its axis "data"; by default all are on one. The
        devices hold the same meta-parameters and exchange their gradients, nothing else.
      report: called with each record of the history when it is made.

    Returns:
      The averaged meta-parameters that did best on the selection tasks, and the history: a dict
      every few outer steps with outer_step, meta_loss, gradient_norm, skipped_steps and
      lost_episodes, and where ``evaluate_every`` says so clean_accuracy and robust_accuracy on the
      selection tasks.

    Raises:
      ValueError: a configuration that cannot be (see `MetaTrainingConfig`, `TaskFamily`), initial
        weights that are not there or do not fit it, or a mesh without an axis "data" or with one
        that does not divide the lanes.
      FloatingPointError: no meta-gradient of the last 50 outer steps, or of the whole run, was
        finite.

    Reference:
      Andrychowicz et al. 2016, section 2.1 (arXiv:1606.04474), after Serban et al. 2020.
    """
    states = training_states(
        config, key=key, families=families, selection=selection, outer_optimizer=outer_optimizer,
        mesh=mesh,
    )  # fmt: skip
    state = next(states)
    for state in states:
        report(state.history[-1])
    return state.best, list(state.history)


def training_states(
    config: MetaTrainingConfig,
    *,
    key: Key,
    families: tuple[TaskFamily, ...] | None = None,
    selection: tuple[TaskFamily, ...] | None = None,
    outer_optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    start: Callable[[TrainingState], TrainingState] = lambda fresh: fresh,
) -> Iterator[TrainingState]:
    """`meta_train` record by record: yields where it starts, then where it stands after each.

    The arrays of a state are used up by the next one: copy what is to be kept.

    Args:
      config, key, families, selection, outer_optimizer, mesh: see `meta_train`.
      start: from the fresh state to the one to start from, e.g. one that was yielded by another
        call with the same arguments. The rest is then the same, bit for bit. If the other
        had another mesh, pass its arrays on the host; the rest then differs by rounding.

    Raises:
      See `meta_train`.
    """
    mesh = check_mesh(mesh, config.lanes)
    families = families or tuple(task.build() for task in config.tasks)
    selection = selection or tuple(task.build() for task in config.selection)
    for family in (*families, *selection):
        _check_fit(family)
    outer_optimizer = outer_optimizer or default_outer_optimizer(config)
    init_key, replay_key, selection_key = jax.random.split(key, 3)
    if config.inner_gradient == "replayed":
        families = tuple(with_replay(family, replay_key) for family in families)
        selection = tuple(with_replay(family, replay_key) for family in selection)
    families, selection, init_key, selection_key, initial = on_every_device(
        (families, selection, init_key, selection_key, _initial(config)), mesh
    )
    outer = init_outer(config, families, outer_optimizer, init_key, mesh, initial)
    best = jax.tree.map(jnp.copy, outer.average)
    state = start(TrainingState(outer, best, jnp.float32(-1.0), ()))
    if mesh is not None:  # a state from the host comes to lie as the fresh one does
        shardings = jax.tree.map(lambda leaf: leaf.sharding, outer)
        state = state._replace(outer=lay_out(state.outer, shardings))
    yield state
    chunk = _steps_a_call(config)
    for done in range(int(state.outer.step) + chunk, config.outer_steps + 1, chunk):
        outer, infos = outer_steps(config, outer_optimizer, chunk, families, state.outer)
        state = state._replace(outer=outer)
        record = _record(done, infos)
        if done % config.evaluate_every == 0 or done == config.outer_steps:
            accuracy = evaluate(config, selection, outer.average, selection_key)
            record |= {f"{k}_accuracy": float(v) for k, v in accuracy._asdict().items()}
            if accuracy.robust > state.best_robust:
                best = jax.tree.map(jnp.copy, outer.average)
                state = state._replace(best=best, best_robust=accuracy.robust)
        state = state._replace(history=(*state.history, record))
        yield state
        _check_alive(state.history, chunk, min(HOPELESS, config.outer_steps))


def _initial(config: MetaTrainingConfig) -> MetaParams | None:
    """The weights that the config names."""
    if config.initial is None:
        return None
    meta_params, *_ = load_weights(weights_path(config.initial))
    check_meta_params(meta_params, config.meta_optimizer)
    return meta_params


def _check_fit(family: TaskFamily) -> None:
    """Raises a ValueError if the pool is outside of the bounds, or not what the model is for."""

    def fresh_model(x: Array) -> Array:
        init, apply = family.optimizee
        return apply(init(jax.random.key(0), x.shape[1:]), x)

    check_attack_inputs(fresh_model, *family.pool, family.threat_model)


def _check_alive(history: tuple[dict, ...], chunk: int, steps: int) -> None:
    """Raises a FloatingPointError if none of the last ``steps`` outer steps was taken."""
    records = math.ceil(steps / chunk)
    last = history[-records:]
    skipped, lost = (sum(r[name] for r in last) for name in ("skipped_steps", "lost_episodes"))
    if skipped == records * chunk:
        raise FloatingPointError(
            f"the meta-gradients of the last {skipped} outer steps were not finite, and {lost} "
            "episodes lost their parameters in them: are the data and the model's outputs finite, "
            "and the outer learning rate small enough?"
        )


def _steps_a_call(config: MetaTrainingConfig) -> int:
    """Outer steps in one compiled call: at most 10, so that a report comes every few seconds."""
    shared = math.gcd(config.outer_steps, min(config.evaluate_every, config.outer_steps))
    return max(n for n in range(1, 11) if shared % n == 0)


def default_outer_optimizer(config: MetaTrainingConfig) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.outer_steps)
    adamw = optax.adamw(schedule, weight_decay=config.weight_decay, mask=is_beyond_nominal)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


@functools.partial(jax.jit, static_argnums=(0, 4))
def evaluate(
    config: MetaTrainingConfig,
    families: tuple[TaskFamily, ...],
    meta_params: MetaParams,
    key: Key,
    repeats: int = 3,
) -> Accuracy:
    """Mean accuracy of models trained for the longest horizon, over families and tasks of each."""
    steps = config.horizon[1]
    inner_gradient = inner_gradients.by_name(config.inner_gradient)

    def run(family: TaskFamily, key: Key) -> Accuracy:
        task_key, train_key, attack_key = jax.random.split(key, 3)
        task = family.sample(task_key)
        aim = aim_at(task.threat_model, steps)
        optimizer = scale_by_meta_optimizer(meta_params, config.meta_optimizer, aim)
        params, _ = train(task, optimizer, train_key, steps=steps, inner_gradient=inner_gradient)
        return held_out_accuracy(task, params, attack_key, attack_steps=20, restarts=1)

    keys = jax.random.split(key, repeats)
    results = [jax.vmap(functools.partial(run, family))(keys) for family in families]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(), *results)


def _record(outer_step: int, infos: OuterInfo) -> dict:
    """One line of the history, as plain numbers; means are over the steps that were taken."""
    taken = max(1, int(infos.finite.sum()))
    return {
        "outer_step": outer_step,
        "meta_loss": float(jnp.where(infos.finite, infos.meta_loss, 0).sum()) / taken,
        "gradient_norm": float(jnp.where(infos.finite, infos.gradient_norm, 0).sum()) / taken,
        "skipped_steps": int((~infos.finite).sum()),
        "lost_episodes": int(infos.lost_episodes.sum()),
    }
