"""The outer loop: d meta-loss / d meta_params by truncated backpropagation through episodes."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from advmeta import inner_gradients
from advmeta.held_out import Accuracy, held_out_accuracy, held_out_loss
from advmeta.meta_loss import MetaLossConfig, meta_loss
from advmeta.meta_optimizer.transform import (
    MetaOptimizerConfig,
    init_meta_params,
    scale_by_meta_optimizer,
)
from advmeta.tasks import TaskConfig, TaskFamily
from advmeta.types import Array, Key, MetaParams
from advmeta.unroll import InnerState, init_inner, train, unroll, with_replay


@dataclasses.dataclass(frozen=True)
class MetaTrainingConfig:
    """Everything that decides the meta-parameters, but for the key.

    Args:
      tasks: what is trained on; every outer step takes all of them.
      selection: what the best meta-parameters are chosen on.
      meta_optimizer: what the LSTM sees and how large it is.
      meta_loss: what is minimised.
      inner_gradient: a name that `advmeta.inner_gradients.by_name` knows.
      outer_steps: updates of the meta-parameters.
      lanes: episodes of each task that run side by side.
      truncation: inner steps that one outer step backpropagates through.
      horizon: shortest and longest episode, in inner steps; each is drawn from the multiples of
        the truncation between them.
      learning_rate: of the outer Adam, at its start; it follows a cosine to zero.
      clip: global norm that meta-gradients are clipped to.
      average: decay of the moving average of the meta-parameters, which is what is evaluated.
      evaluate_every: outer steps between evaluations.
    """

    tasks: tuple[TaskConfig, ...] = (
        TaskConfig(optimizee="linear"),
        TaskConfig(optimizee="mlp-10"),
        TaskConfig(optimizee="mlp-20"),
    )
    selection: tuple[TaskConfig, ...] = (
        TaskConfig(optimizee="mlp-24", train_examples=800),
        TaskConfig(optimizee="mlp-24-16", train_examples=800),
    )
    meta_optimizer: MetaOptimizerConfig = MetaOptimizerConfig()
    meta_loss: MetaLossConfig = MetaLossConfig()
    inner_gradient: str = "clean"
    outer_steps: int = 400
    lanes: int = 4
    truncation: int = 20
    horizon: tuple[int, int] = (60, 200)
    learning_rate: float = 3e-3
    clip: float = 1.0
    average: float = 0.98
    evaluate_every: int = 50

    def __post_init__(self):
        inner_gradients.by_name(self.inner_gradient)
        for name in ("outer_steps", "lanes", "truncation", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        shortest, longest = self.horizon
        if shortest % self.truncation or longest % self.truncation:
            raise ValueError(
                f"truncation={self.truncation} must divide both ends of horizon={self.horizon}; "
                f"write horizon=({self.truncation}, {self.truncation * 10}), say"
            )
        if not 0 < shortest <= longest:
            raise ValueError(f"horizon={self.horizon} must be (shortest, longest), both positive")
        if not self.tasks or not self.selection:
            raise ValueError("tasks and selection must each hold at least one TaskConfig")
        if not 0 <= self.average < 1:
            raise ValueError(f"average={self.average} must be at least 0 and below 1")


class Lane(NamedTuple):
    """An episode in progress."""

    inner: InnerState
    key: Key  # of the episode: its task, its fresh parameters, its batches
    horizon: Array  # [] int32: inner steps until the next episode starts


class OuterState(NamedTuple):
    """What the next outer step needs."""

    meta_params: MetaParams
    average: MetaParams
    outer_opt_state: optax.OptState
    lanes: tuple[Lane, ...]  # one a task family; every leaf has a leading axis [lanes]
    key: Key
    step: Array  # [] int32


class OuterInfo(NamedTuple):
    """What a person needs of an outer step."""

    meta_loss: Array
    gradient_norm: Array  # before clipping
    finite: Array  # bool: the step was taken; else it was skipped
    lost_episodes: Array  # int32: episodes restarted because their parameters were not finite


Report = Callable[[dict], None]


def meta_train(
    config: MetaTrainingConfig,
    *,
    key: Key,
    families: tuple[TaskFamily, ...] | None = None,
    selection: tuple[TaskFamily, ...] | None = None,
    outer_optimizer: optax.GradientTransformation | None = None,
    report: Report = lambda record: None,
) -> tuple[MetaParams, list[dict]]:
    """Meta-trains a meta-optimizer.

    Outer step: every lane runs ``truncation`` inner steps from where it stands;
    ``phi <- phi - outer_optimizer( d/dphi mean_lanes meta_loss )``. Lanes that have come to their
    horizon start a new episode on a new task. First horizons are staggered, so that lanes are at
    different places of their episodes.

    Args:
      config: see `MetaTrainingConfig`.
      key: the same key gives the same weights, bit for bit on one machine.
      families: task families to use instead of ``config.tasks``, for one's own data and models.
      selection: families to use instead of ``config.selection``.
      outer_optimizer: any optax optimizer instead of clipped Adam with a cosine schedule.
      report: called with each record of the history when it is made.

    Returns:
      The averaged meta-parameters that did best on the selection tasks, and the history: a dict
      every few outer steps with outer_step, meta_loss, gradient_norm, skipped_steps and
      lost_episodes, and where ``evaluate_every`` says so clean_accuracy and robust_accuracy on the
      selection tasks.

    Raises:
      ValueError: a configuration that cannot be (see `MetaTrainingConfig`, `TaskFamily`).
      FloatingPointError: no outer step of the run had a finite meta-gradient.

    Reference:
      Andrychowicz et al. 2016, section 2.1 (arXiv:1606.04474), after Serban et al. 2020.
    """
    families = families or tuple(task.build() for task in config.tasks)
    selection = selection or tuple(task.build() for task in config.selection)
    outer_optimizer = outer_optimizer or default_outer_optimizer(config)
    init_key, replay_key, selection_key = jax.random.split(key, 3)
    if config.inner_gradient == "replayed":
        families = tuple(with_replay(family, replay_key) for family in families)
        selection = tuple(with_replay(family, replay_key) for family in selection)
    state = init_outer(config, families, outer_optimizer, init_key)
    best, best_robust, history = state.average, -1.0, []
    chunk = _steps_a_call(config)
    for done in range(chunk, config.outer_steps + 1, chunk):
        state, infos = outer_steps(config, outer_optimizer, chunk, families, state)
        record = _record(done, infos)
        if done % config.evaluate_every == 0 or done == config.outer_steps:
            accuracy = evaluate(config, selection, state.average, selection_key)
            record |= {f"{k}_accuracy": float(v) for k, v in accuracy._asdict().items()}
            if accuracy.robust > best_robust:
                best, best_robust = jax.tree.map(jnp.copy, state.average), accuracy.robust
        history.append(record)
        report(record)
    if sum(record["skipped_steps"] for record in history) == config.outer_steps:
        raise FloatingPointError(
            "no outer step had a finite meta-gradient: are the data and the model's outputs finite?"
        )
    return best, history


def _steps_a_call(config: MetaTrainingConfig) -> int:
    """Outer steps in one compiled call: at most 10, so that a report comes every few seconds."""
    shared = math.gcd(config.outer_steps, min(config.evaluate_every, config.outer_steps))
    return max(n for n in range(1, 11) if shared % n == 0)


def default_outer_optimizer(config: MetaTrainingConfig) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.outer_steps)
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(schedule))


@functools.partial(jax.jit, static_argnums=(0, 2))
def init_outer(
    config: MetaTrainingConfig,
    families: tuple[TaskFamily, ...],
    outer_optimizer: optax.GradientTransformation,
    key: Key,
) -> OuterState:
    meta_key, lanes_key, outer_key = jax.random.split(key, 3)
    meta_params = init_meta_params(config.meta_optimizer, meta_key)

    def staggered_lane(family: TaskFamily, key: Key) -> Lane:
        lane = new_lane(config, family, meta_params, key)
        first = _draw_horizon(config, jax.random.fold_in(key, 1), shortest=config.truncation)
        return lane._replace(horizon=first)

    keys = [jax.random.split(k, config.lanes) for k in jax.random.split(lanes_key, len(families))]
    lanes = tuple(
        jax.vmap(functools.partial(staggered_lane, family))(family_keys)
        for family, family_keys in zip(families, keys, strict=True)
    )
    return OuterState(
        meta_params=meta_params,
        average=meta_params,
        outer_opt_state=outer_optimizer.init(meta_params),
        lanes=lanes,
        key=outer_key,
        step=jnp.zeros([], jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def outer_steps(
    config: MetaTrainingConfig,
    outer_optimizer: optax.GradientTransformation,
    steps: int,
    families: tuple[TaskFamily, ...],
    state: OuterState,
) -> tuple[OuterState, OuterInfo]:
    """Takes outer steps in one `jax.lax.scan`; the infos are stacked [steps]."""
    step = functools.partial(outer_step, config, outer_optimizer, families)
    return jax.lax.scan(lambda state, _: step(state), state, length=steps)


def outer_step(
    config: MetaTrainingConfig,
    outer_optimizer: optax.GradientTransformation,
    families: tuple[TaskFamily, ...],
    state: OuterState,
) -> tuple[OuterState, OuterInfo]:
    """One outer step; a step whose meta-gradient is not finite is skipped and counted."""

    def objective(meta_params: MetaParams):
        # A copy of phi for each lane: gradients of one that they share would be sums over lanes
        # within every inner step, as products that XLA computes in half the speed.
        phi = jax.tree.map(lambda p: jnp.broadcast_to(p, (config.lanes, *p.shape)), meta_params)
        losses, lanes = [], []
        for family, lane in zip(families, state.lanes, strict=True):
            run = functools.partial(run_truncation, config, family)
            loss, lane = jax.vmap(run)(phi, lane)
            losses.append(loss.mean())
            lanes.append(lane)
        return sum(losses) / len(losses), tuple(lanes)

    (loss, lanes), gradient = jax.value_and_grad(objective, has_aux=True)(state.meta_params)
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    gradient = jax.tree.map(lambda g: jnp.where(finite, g, 0.0), gradient)
    updates, outer_opt_state = outer_optimizer.update(
        gradient, state.outer_opt_state, state.meta_params
    )
    meta_params = optax.apply_updates(state.meta_params, updates)
    stepped = state._replace(
        meta_params=meta_params,
        average=optax.incremental_update(meta_params, state.average, 1 - config.average),
        outer_opt_state=outer_opt_state,
    )
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
    key, lanes_key = jax.random.split(state.key)
    lanes, lost = _restart_finished(config, families, meta_params, lanes, lanes_key)
    state = state._replace(lanes=lanes, key=key, step=state.step + 1)
    return state, OuterInfo(loss, norm, finite, lost)


def run_truncation(
    config: MetaTrainingConfig, family: TaskFamily, meta_params: MetaParams, lane: Lane
) -> tuple[Array, Lane]:
    """The meta-loss of the next ``truncation`` inner steps of a lane, differentiable in phi."""
    task_key, _, episode_key = jax.random.split(lane.key, 3)
    task = family.sample(task_key)
    inner, trajectory = unroll(
        task,
        scale_by_meta_optimizer(meta_params, config.meta_optimizer),
        lane.inner,
        episode_key,
        steps=config.truncation,
        inner_gradient=inner_gradients.by_name(config.inner_gradient),
        evaluate=functools.partial(held_out_loss, task, attack_steps=config.meta_loss.attack_steps),
    )
    return meta_loss(config.meta_loss, trajectory), lane._replace(inner=inner)


def new_lane(
    config: MetaTrainingConfig, family: TaskFamily, meta_params: MetaParams, key: Key
) -> Lane:
    """A new episode: a task, fresh parameters, a horizon."""
    task_key, init_key, _ = jax.random.split(key, 3)
    optimizer = scale_by_meta_optimizer(meta_params, config.meta_optimizer)
    inner_gradient = inner_gradients.by_name(config.inner_gradient)
    inner = init_inner(family.sample(task_key), optimizer, init_key, inner_gradient)
    return Lane(inner, key, _draw_horizon(config, key, shortest=config.horizon[0]))


def _draw_horizon(config: MetaTrainingConfig, key: Key, shortest: int) -> Array:
    low, high = shortest // config.truncation, config.horizon[1] // config.truncation
    return config.truncation * jax.random.randint(jax.random.fold_in(key, 0), (), low, high + 1)


def _restart_finished(config, families, meta_params, lanes, key) -> tuple[tuple[Lane, ...], Array]:
    """Starts a new episode in lanes that are at their horizon or have lost their parameters."""

    def restart(family: TaskFamily, lane: Lane, key: Key) -> tuple[Lane, Array]:
        lost = ~jnp.isfinite(optax.tree.norm(lane.inner.params))
        fresh = new_lane(config, family, meta_params, key)
        over = lost | (lane.inner.step >= lane.horizon)
        return jax.tree.map(lambda new, old: jnp.where(over, new, old), fresh, lane), lost

    restarted, lost = [], []
    keys = jax.random.split(key, len(families))
    for family, family_lanes, family_key in zip(families, lanes, keys, strict=True):
        lane_keys = jax.random.split(family_key, config.lanes)
        lane, gone = jax.vmap(functools.partial(restart, family))(family_lanes, lane_keys)
        restarted.append(lane)
        lost.append(gone.sum())
    return tuple(restarted), sum(lost)


@functools.partial(jax.jit, static_argnums=(0, 4))
def evaluate(
    config: MetaTrainingConfig,
    families: tuple[TaskFamily, ...],
    meta_params: MetaParams,
    key: Key,
    repeats: int = 3,
) -> Accuracy:
    """Mean accuracy of models trained for the longest horizon, over families and tasks of each."""
    optimizer = scale_by_meta_optimizer(meta_params, config.meta_optimizer)
    inner_gradient = inner_gradients.by_name(config.inner_gradient)

    def run(family: TaskFamily, key: Key) -> Accuracy:
        task_key, train_key, attack_key = jax.random.split(key, 3)
        task = family.sample(task_key)
        params, _ = train(
            task, optimizer, train_key, steps=config.horizon[1], inner_gradient=inner_gradient
        )
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
