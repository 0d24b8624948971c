import collections
import functools

import jax
import numpy as np
import optax
import pytest
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import random_meta_params, tiny_family, tiny_pool, tiny_task

from advmeta import inner_gradients, optimizees
from advmeta.meta_optimizer import MetaOptimizerConfig, scale_by_meta_optimizer
from advmeta.unroll import init_inner, train, unroll, with_replay

KEY, INIT_KEY = jax.random.split(jax.random.key(0))
STEPS = 4
OPTIMIZEE = optimizees.mlp((3,), "tanh", 3)
TASK = tiny_task(OPTIMIZEE, replay=1 - tiny_pool().x[:16])
CONFIG = MetaOptimizerConfig(hidden=(2,))
META_PARAMS = random_meta_params(CONFIG)
LOSS = MetaOptimizerConfig((2,), ("adam", "loss"))
OPTIMIZERS = {
    "optax.adam": optax.adam(0.05),
    "meta": scale_by_meta_optimizer(META_PARAMS, CONFIG),
    "meta, loss": scale_by_meta_optimizer(random_meta_params(LOSS), LOSS),
}
INNER_GRADIENTS = {
    "clean": inner_gradients.clean,
    "adversarial": inner_gradients.adversarial(steps=2),
    "replayed": inner_gradients.replayed,
}


TRACES = collections.Counter()


def same_params(params, key):
    del key
    return params


def compiled(optimizer, gradient="clean", steps=STEPS):
    return compiled_once(optimizer, gradient, steps)  # whichever way the defaults are written


@functools.cache
def compiled_once(optimizer, gradient, steps):
    def run(task, state, key):
        TRACES[optimizer, gradient, steps] += 1
        return unroll(
            task, OPTIMIZERS[optimizer], state, key, steps=steps,
            inner_gradient=INNER_GRADIENTS[gradient], evaluate=same_params,
        )  # fmt: skip

    return jax.jit(run)


@functools.cache
def state_of(optimizer):
    return jax.jit(lambda key: init_inner(TASK, OPTIMIZERS[optimizer], key))(INIT_KEY)


@functools.cache
def in_one_piece(optimizer, gradient="clean"):
    return compiled(optimizer, gradient)(TASK, state_of(optimizer), KEY)


def close(a, b, rtol=1e-6, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol, atol), a, b)


@functools.cache
def compiled_gradient(name):
    return jax.jit(INNER_GRADIENTS[name])


@functools.cache
def compiled_update(name):
    update = optax.with_extra_args_support(OPTIMIZERS[name]).update
    return jax.jit(lambda g, state, params, loss: update(g, state, params, value=loss))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("gradient", INNER_GRADIENTS)
def test_unroll_is_a_python_loop(optimizer, gradient):
    (params, opt_state, *_), losses, norms, path = state_of(optimizer), [], [], []
    for t in range(STEPS):
        gradient_key, _ = jax.random.split(jax.random.fold_in(KEY, t))
        loss, g = compiled_gradient(gradient)(TASK, params, gradient_key)
        updates, opt_state = compiled_update(optimizer)(g, opt_state, params, loss)
        params = jax.tree.map(np.add, params, updates)
        losses.append(loss)
        norms.append(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(g))))
        path.append(params)

    state, trajectory = in_one_piece(optimizer, gradient)
    close(state.params, params)
    assert state.step == STEPS
    close(state.opt_state, opt_state, rtol=1e-5)
    close(trajectory.loss, np.array(losses))
    close(trajectory.gradient_norm, np.array(norms), rtol=1e-5)
    for t in range(STEPS):  # evaluated after the update
        close(jax.tree.map(lambda p, t=t: p[t], trajectory.evaluation), path[t])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_pieces_are_one(optimizer):
    state, parts = state_of(optimizer), []
    for _ in range(2):
        state, trajectory = compiled(optimizer, steps=STEPS // 2)(TASK, state, KEY)
        parts.append(trajectory)
    whole_state, whole = in_one_piece(optimizer)
    close(state, whole_state)
    close(jax.tree.map(lambda a, b: np.concatenate([a, b]), *parts), whole)


def test_kinds_of_inner_gradient_differ():
    # Or the comparison with the loop would say little.
    finals = [in_one_piece("meta", name)[0].params for name in INNER_GRADIENTS]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        gap = jax.tree.map(lambda u, v: abs(u - v).max(), finals[a], finals[b])
        assert max(map(float, jax.tree.leaves(gap))) > 1e-4


def test_vmap_over_tasks_and_keys_is_a_loop():
    keys = jax.random.split(KEY, 2)
    family = tiny_family(OPTIMIZEE, replay=1 - tiny_pool().x)
    tasks = jax.jit(jax.vmap(family.sample))(keys)
    run, state = compiled("meta"), state_of("meta")
    together = jax.jit(jax.vmap(run, in_axes=(0, None, 0)))(tasks, state, keys)
    for i in range(2):
        task, found = jax.tree.map(lambda a, i=i: a[i], (tasks, together))
        close(found, run(task, state, keys[i]), rtol=1e-4, atol=1e-5)


def test_new_data_keys_and_states_are_not_a_new_compilation():
    state, _ = in_one_piece("meta")
    other = tiny_task(OPTIMIZEE, replay=tiny_pool().x[:16])
    before = TRACES.copy()
    compiled("meta")(other, state, INIT_KEY)
    assert before == TRACES and before["meta", "clean", STEPS] >= 1


def test_train_is_init_and_unroll():
    init_key, episode_key = jax.random.split(KEY)
    optimizer = OPTIMIZERS["optax.adam"]
    params, _ = jax.jit(lambda key: train(TASK, optimizer, key, steps=STEPS))(KEY)
    state = jax.jit(lambda key: init_inner(TASK, optimizer, key))(init_key)
    state, _ = compiled("optax.adam")(TASK, state, episode_key)
    close(params, state.params)


def test_replay_attacks_a_source_model_of_the_same_data():
    for task in (tiny_task(OPTIMIZEE), tiny_family(OPTIMIZEE)):
        x = task.train.x if hasattr(task, "train") else task.pool.x
        moved = with_replay(task, KEY, steps=20, attack_steps=2)
        assert moved.replay.shape == x.shape and type(moved) is type(task)
        distance = np.asarray(task.threat_model.distance(x, moved.replay))
        assert distance.max() <= 0.1 * (1 + 1e-5) and distance.min() > 0
    again = with_replay(tiny_family(OPTIMIZEE), KEY, steps=20, attack_steps=2)
    np.testing.assert_array_equal(again.replay, moved.replay)
