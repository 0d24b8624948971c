"""The estimators of the meta-gradient where it is known, and in a meta-training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import tiny_family

from advmeta import optimizees, persistent_evolution
from advmeta.meta_loss import MetaLossConfig
from advmeta.meta_optimizer import MetaOptimizerConfig
from advmeta.meta_training import default_outer_optimizer
from advmeta.meta_training_config import MetaTrainingConfig
from advmeta.outer_step import Lane, init_outer, outer_steps, truncated_backpropagation

# An optimizee of one parameter x with the loss x^2 / 2. The optimizer is gradient descent with the
# step 1 - RHO that adds a constant theta, the only meta-parameter:
#   x_{t+1} = RHO x_t + theta,  so  x_t = RHO^t x_0 + c_t theta,  c_t = (1 - RHO^t) / (1 - RHO).
# The meta-loss of a truncation of K steps is the mean of x_t^2 / 2 over them, so that of an episode
# of T steps has the gradient  1/K sum_{t=1}^T x_t c_t,  and what one truncation sees of it, which
# takes its first x for given, is  1/K sum_{j=1}^K x_{i+j} c_j  for each start i = 0, K, 2K, ...
RHO, X_0, THETA, HORIZON = 0.9, 1.0, 0.3, 12
T = np.arange(1, HORIZON + 1)


def c(t):
    return (1 - RHO**t) / (1 - RHO)


X_T = RHO**T * X_0 + c(T) * THETA
ESTIMATORS = {
    "backpropagation": truncated_backpropagation,
    "pes": functools.partial(persistent_evolution.estimate, 0.5, False),
    "nres": functools.partial(persistent_evolution.estimate, 0.5, True),
}
EPISODES, LANES = 400, 50


@functools.cache
def estimates(estimator, truncation):
    """Mean and standard error of the sum of the estimates over an episode, theta held fixed."""

    def run(theta, lane):
        def step(x, _):
            x = RHO * x + theta
            return x, x**2 / 2

        x, losses = jax.lax.scan(step, lane.inner, length=truncation)
        return losses.mean(), lane._replace(inner=x)

    theta, x = jnp.float32(THETA), jnp.full(LANES, X_0, jnp.float32)
    start = persistent_evolution.Persistent(x, jnp.zeros(LANES))

    @jax.jit
    @jax.vmap
    def episode(key):
        def outer_step(lanes, key):
            _, gradient, lanes = ESTIMATORS[estimator]((run,), theta, lanes, key)
            return lanes, gradient

        lanes_key, key = jax.random.split(key)
        lanes = Lane(x, jax.random.split(lanes_key, LANES), jnp.zeros(LANES), start)
        keys = jax.random.split(key, HORIZON // truncation)
        return jax.lax.scan(outer_step, (lanes,), keys)[1].sum()

    found = np.asarray(episode(jax.random.split(jax.random.key(1), EPISODES)), np.float64)
    return found.mean(), found.std() / EPISODES**0.5


@pytest.mark.parametrize("truncation", [1, 3, HORIZON])
@pytest.mark.parametrize("estimator", ["pes", "nres"])
def test_they_are_the_gradient_of_the_whole_episode_in_expectation(estimator, truncation):
    # The loss is quadratic in all perturbations, and opposite ones cancel what is even in them, so
    # nothing is left of the smoothing. 4 standard errors are missed in one of 16,000 cases.
    exact = (X_T * c(T)).sum() / truncation
    mean, error = estimates(estimator, truncation)
    assert abs(mean - exact) < 4 * error
    assert error < 0.02 * exact


def test_one_perturbation_an_episode_is_less_noisy_where_each_truncation_has_its_own_gradient():
    # Truncation t adds theta_t to x, and the last one's loss is x: the gradient is 1 everywhere. Of
    # K truncations, xi has K times the variance of one perturbation, and so has the loss.
    count, lanes = 8, 4000

    def run(theta, lane):
        x, t = lane.inner
        x += theta[t]
        return jnp.where(t == count - 1, x, 0.0), lane._replace(inner=(x, t + 1))

    theta = jnp.zeros(count)
    inner = jnp.zeros(lanes), jnp.zeros(lanes, jnp.int32)
    keys = jax.random.split(jax.random.key(0), lanes)
    variances = {}
    for name in ("pes", "nres"):
        start = persistent_evolution.Persistent(inner, jnp.zeros((lanes, count)))
        episodes = jax.vmap(lambda lane: jax.tree.map(lambda leaf: leaf[None], lane))(
            Lane(inner, keys, jnp.zeros(lanes), start)
        )

        @jax.jit
        @jax.vmap
        def last_gradient(lane, key, estimate=ESTIMATORS[name]):
            for t in range(count):
                _, gradient, (lane,) = estimate((run,), theta, (lane,), jax.random.fold_in(key, t))
            return gradient

        found = last_gradient(episodes, jax.random.split(jax.random.key(1), lanes))
        np.testing.assert_allclose(found.mean(axis=0), 1.0, atol=5 * (64 / lanes) ** 0.5)
        variances[name] = found.var(axis=0).mean()
    # K^2 + 1 and K + 1, by the moments of Gaussians.
    np.testing.assert_allclose(variances["pes"], count**2 + 1, rtol=0.15)
    np.testing.assert_allclose(variances["nres"], count + 1, rtol=0.15)


@pytest.mark.parametrize("truncation", [1, 3, HORIZON])
def test_backpropagation_sees_one_truncation_of_it(truncation):
    exact = (X_T * c(T)).sum() / truncation
    within = (X_T * c((T - 1) % truncation + 1)).sum() / truncation
    mean, _ = estimates("backpropagation", truncation)
    np.testing.assert_allclose(mean, within, rtol=1e-5)
    if truncation == HORIZON:
        np.testing.assert_allclose(mean, exact, rtol=1e-5)
    else:
        pes, error = estimates("pes", truncation)
        assert mean < 0.6 * exact and pes - mean > 20 * error


CONFIG = MetaTrainingConfig(
    meta_optimizer=MetaOptimizerConfig(hidden=(2,)), lanes=3, truncation=2, horizon=(4, 4),
    meta_loss=MetaLossConfig(loss="calibrated"), sigma=0.1,
)  # fmt: skip
OUTER = default_outer_optimizer(CONFIG)
FAMILY = tiny_family(optimizees.linear(num_classes=3))


@pytest.mark.parametrize("estimator", ["pes", "nres"])
def test_twins_part_in_an_episode_and_meet_where_the_next_one_starts(estimator):
    config = dataclasses.replace(CONFIG, estimator=estimator)
    state = init_outer(config, (FAMILY,), OUTER, jax.random.key(0))
    seen = set()
    for _ in range(4):
        before = jax.device_get(state.meta_params)
        state, info = outer_steps(config, OUTER, 1, (FAMILY,), state)
        assert info.finite.all() and info.gradient_norm > 0
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, state.meta_params)
        assert min(jax.tree.leaves(moved)) > 0
        (lane,) = state.lanes
        kernel, twin = (
            inner.params["layer_0"]["kernel"] for inner in (lane.inner, lane.persistent.twin)
        )
        xi = lane.persistent.perturbation["lstm"]["readout"]["kernel"]
        for i, t in enumerate(lane.inner.step.tolist()):
            assert lane.persistent.twin.step[i] == t
            assert (t == 0) == np.array_equal(kernel[i], twin[i]) == (not np.any(xi[i]))
            seen.add(t)
    assert seen == {0, 2}


def test_a_lane_is_lost_with_its_twin():
    state = init_outer(CONFIG, (FAMILY,), OUTER, jax.random.key(0))
    (lane,) = state.lanes
    twin = lane.persistent.twin
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), twin.params)
    persistent = lane.persistent._replace(twin=twin._replace(params=broken))
    state = state._replace(lanes=(lane._replace(persistent=persistent),))
    state, info = outer_steps(CONFIG, OUTER, 1, (FAMILY,), state)
    assert not info.finite[0] and info.lost_episodes[0] == 1
    _, info = outer_steps(CONFIG, OUTER, 1, (FAMILY,), state)
    assert info.finite[0] and info.lost_episodes[0] == 0
