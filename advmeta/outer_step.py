"""The outer step: estimate d meta-loss / d meta_params, and follow it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from advmeta import inner_gradients, persistent_evolution
from advmeta.held_out import held_out_loss
from advmeta.meta_loss import meta_loss
from advmeta.meta_optimizer.transform import init_meta_params, scale_by_meta_optimizer
from advmeta.meta_training_config import MetaTrainingConfig
from advmeta.sharding import split_over_devices
from advmeta.task_families import TaskFamily
from advmeta.tasks import aim_at
from advmeta.types import Array, Key, MetaParams
from advmeta.unroll import InnerState, init_inner, unroll


class Lane(NamedTuple):
    """An episode in progress."""

    inner: InnerState
    key: Key  # of the episode: its task, its fresh parameters, its batches
    horizon: Array  # [] int32: inner steps until the next episode starts
    persistent: persistent_evolution.Persistent | tuple[()] = ()  # where that is the estimator


# One truncation of a lane and its meta-loss [].
Run = Callable[[MetaParams, Lane], tuple[Array, Lane]]
# A run and lanes with a leading axis for each family -> the loss [], its gradient, and the lanes.
Estimator = Callable[
    [tuple[Run, ...], MetaParams, tuple[Lane, ...], Key],
    tuple[Array, MetaParams, tuple[Lane, ...]],
]


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


@functools.partial(jax.jit, static_argnums=(0, 2, 4))
def init_outer(
    config: MetaTrainingConfig,
    families: tuple[TaskFamily, ...],
    outer_optimizer: optax.GradientTransformation,
    key: Key,
    mesh: Mesh | None = None,
    initial: MetaParams | None = None,
) -> OuterState:
    """The state before the first outer step; where it lies decides where the steps are taken."""
    meta_key, lanes_key, outer_key = jax.random.split(key, 3)
    meta_params = initial or init_meta_params(config.meta_optimizer, meta_key)
    # What is given would be in the state twice, and such a state cannot be donated.
    meta_params, average = (jax.tree.map(jnp.copy, meta_params) for _ in range(2))

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
        average=average,
        outer_opt_state=outer_optimizer.init(meta_params),
        lanes=split_over_devices(lanes, mesh),
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
    key, lanes_key, estimate_key = jax.random.split(state.key, 3)
    runs = tuple(functools.partial(run_truncation, config, family) for family in families)
    estimate = _estimator(config)
    loss, gradient, lanes = estimate(runs, state.meta_params, state.lanes, estimate_key)
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
    lanes, lost = _restart_finished(config, families, meta_params, lanes, lanes_key)
    state = state._replace(lanes=lanes, key=key, step=state.step + 1)
    return state, OuterInfo(loss, norm, finite, lost)


def _estimator(config: MetaTrainingConfig) -> Estimator:
    return {
        "backpropagation": truncated_backpropagation,
        "pes": functools.partial(persistent_evolution.estimate, config.sigma, False),
        "nres": functools.partial(persistent_evolution.estimate, config.sigma, True),
    }[config.estimator]


def truncated_backpropagation(
    runs: tuple[Run, ...], meta_params: MetaParams, lanes: tuple[Lane, ...], key: Key
) -> tuple[Array, MetaParams, tuple[Lane, ...]]:
    """An `Estimator`: the gradient within the truncation, as if what came before it were given."""
    del key

    def objective(meta_params: MetaParams):
        # A copy of phi for each lane: gradients of one that they share would be sums over lanes
        # within every inner step, as products that XLA computes in half the speed.
        count = lanes[0].horizon.shape[0]
        phi = jax.tree.map(lambda p: jnp.broadcast_to(p, (count, *p.shape)), meta_params)
        losses, after = zip(
            *(jax.vmap(run)(phi, lane) for run, lane in zip(runs, lanes, strict=True)), strict=True
        )
        return sum(loss.mean() for loss in losses) / len(losses), after

    (loss, lanes), gradient = jax.value_and_grad(objective, has_aux=True)(meta_params)
    return loss, gradient, lanes


def run_truncation(
    config: MetaTrainingConfig, family: TaskFamily, meta_params: MetaParams, lane: Lane
) -> tuple[Array, Lane]:
    """The meta-loss of the next ``truncation`` inner steps of a lane, differentiable in phi."""
    task_key, _, episode_key = jax.random.split(lane.key, 3)
    task = family.sample(task_key)
    aim = aim_at(task.threat_model, _told_horizon(config, lane))
    every = config.meta_loss.every or config.truncation
    inner, trajectory = unroll(
        task,
        scale_by_meta_optimizer(meta_params, config.meta_optimizer, aim),
        lane.inner,
        episode_key,
        steps=config.truncation,
        inner_gradient=inner_gradients.by_name(config.inner_gradient),
        evaluate=functools.partial(
            held_out_loss,
            task,
            attack_steps=config.meta_loss.attack_steps,
            loss=config.meta_loss.loss,
            examples=config.meta_loss.examples,
        ),
        every=every,
        recompute=config.recompute,
    )
    looks = lane.inner.step + every * (1 + jnp.arange(config.truncation // every))
    progress = looks / lane.horizon
    return meta_loss(config.meta_loss, trajectory, progress), lane._replace(inner=inner)


def _told_horizon(config: MetaTrainingConfig, lane: Lane) -> Array:
    """The lane's horizon, or 0, not known, in some episodes."""
    told = jax.random.bernoulli(jax.random.fold_in(lane.key, 2), config.horizon_known)
    return jnp.where(told, lane.horizon, 0)


def new_lane(
    config: MetaTrainingConfig, family: TaskFamily, meta_params: MetaParams, key: Key
) -> Lane:
    """A new episode: a task, fresh parameters, a horizon."""
    task_key, init_key, _ = jax.random.split(key, 3)
    optimizer = scale_by_meta_optimizer(meta_params, config.meta_optimizer)
    inner_gradient = inner_gradients.by_name(config.inner_gradient)
    inner = init_inner(family.sample(task_key), optimizer, init_key, inner_gradient)
    lane = Lane(inner, key, _draw_horizon(config, key, shortest=config.horizon[0]))
    if config.estimator != "backpropagation":
        lane = lane._replace(persistent=persistent_evolution.begin(inner, meta_params))
    return lane


def _draw_horizon(config: MetaTrainingConfig, key: Key, shortest: int) -> Array:
    low, high = shortest // config.truncation, config.horizon[1] // config.truncation
    return config.truncation * jax.random.randint(jax.random.fold_in(key, 0), (), low, high + 1)


def _restart_finished(config, families, meta_params, lanes, key) -> tuple[tuple[Lane, ...], Array]:
    """Starts a new episode in lanes that are at their horizon or have lost their parameters."""

    def restart(family: TaskFamily, lane: Lane, key: Key) -> tuple[Lane, Array]:
        twins = [lane.inner, *lane.persistent[:1]]
        lost = ~jnp.isfinite(optax.tree.norm([inner.params for inner in twins]))
        fresh = new_lane(config, family, meta_params, key)
        over = lost | (lane.inner.step >= lane.horizon)
        choose = functools.partial(jax.tree.map, lambda new, old: jnp.where(over, new, old))
        chosen = choose(fresh, lane)
        if lane.persistent:
            # From what was chosen: XLA may compute what is fresh twice, a rounding apart.
            twin = choose(chosen.inner, lane.persistent.twin)
            chosen = chosen._replace(persistent=chosen.persistent._replace(twin=twin))
        return chosen, lost

    restarted, lost = [], []
    keys = jax.random.split(key, len(families))
    for family, family_lanes, family_key in zip(families, lanes, keys, strict=True):
        lane_keys = jax.random.split(family_key, config.lanes)
        lane, gone = jax.vmap(functools.partial(restart, family))(family_lanes, lane_keys)
        restarted.append(lane)
        lost.append(gone.sum())
    return tuple(restarted), jnp.asarray(sum(lost))
