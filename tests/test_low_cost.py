"""Adversarial training with fewer gradients than PGD's: each recipe against its equation."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from fixtures.linear_model import (
    EPSILON,
    KEY,
    PARAMS,
    TASK,
    B,
    W,
    close,
    cross_entropy,
    error,
    first_draw,
    linear_gradient,
    predict,
    project,
    random_start,
    softmax,
)
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import random_like, tiny_task

import advmeta
from advmeta import optimizees
from advmeta.inner_gradients import fgsm_rs, free, remembered, yopo
from advmeta.tasks import draw
from advmeta.types import Batch
from advmeta.unroll import init_inner, unroll


def test_fgsm_rs_is_one_step_from_a_random_start():
    # d CE / dx = W (p - e_y).
    x, y, start_key = first_draw()
    start = random_start(start_key, x)
    step = 1.25 * EPSILON * np.sign(error(predict(start), y) @ W.T)
    x_adv = project(start + step, x)
    p = predict(x_adv)
    loss, gradient = jax.jit(fgsm_rs)(TASK, PARAMS, KEY)
    close(gradient, linear_gradient((x_adv, error(p, y))))
    np.testing.assert_allclose(loss, cross_entropy(p, y), rtol=1e-5)
    # The step is longer than epsilon, so that most coordinates end at the edge of the ball, and
    # shorter than its diameter, so that not all do.
    inside = (x > EPSILON) & (x < 1 - EPSILON)
    at_edge = np.isclose(abs(x_adv - x), EPSILON, atol=1e-6)[inside].mean()
    assert 0.4 < at_edge < 0.9


@pytest.mark.parametrize("m", [1, 3])
def test_free_keeps_the_batch_for_m_steps_and_the_perturbation_throughout(m):
    """With m = 1 it is FGSM training whose perturbation is carried along."""
    w, b, delta, losses = W, B, np.zeros((4, 4), np.float32), []
    for t in range(6):
        if t % m == 0:
            batch_key, _ = jax.random.split(jax.random.fold_in(KEY, t))
            x, y = draw(TASK.train, batch_key, TASK.batch_size)
            x = np.asarray(x).reshape(4, 4)
        x_adv = project(x + delta, x)
        p = predict(x_adv, w, b)
        losses.append(cross_entropy(p, y))
        gradient = linear_gradient((x_adv, error(p, y)))["layer_0"]
        # Both are moved by the gradient at the same point.
        delta = project(x_adv + EPSILON * np.sign(error(p, y) @ w.T), x) - x
        w, b = w - 0.5 * gradient["kernel"], b - 0.5 * gradient["bias"]

    state = init_inner(TASK, optax.sgd(0.5), KEY, free(m))._replace(params=PARAMS)
    run = jax.jit(functools.partial(
        unroll, TASK, optax.sgd(0.5), key=KEY, steps=2, inner_gradient=free(m)
    ))  # fmt: skip
    found = []
    for _ in range(3):  # in pieces: the batch and the perturbation go from one to the next
        state, trajectory = run(state)
        found.append(trajectory.loss)
    np.testing.assert_allclose(np.concatenate(found), losses, rtol=1e-4)
    close(state.params, {"layer_0": {"kernel": w, "bias": b}})
    close(state.gradient_state.delta.reshape(4, 4), delta)


def test_remembered_moves_each_example_by_its_own_last_gradient():
    w, b, delta, losses = W, B, np.zeros((16, 4), np.float32), []
    everything, alike = np.arange(16), 0
    for t in range(9):
        batch_key, _ = jax.random.split(jax.random.fold_in(KEY, t))
        i = np.asarray(draw(Batch(everything, everything), batch_key, TASK.batch_size).x)
        alike += len(np.unique(i)) < 4
        x, y = np.asarray(TASK.train.x[i]).reshape(4, 4), TASK.train.y[i]
        x_adv = x + delta[i]
        p = predict(x_adv, w, b)
        losses.append(cross_entropy(p, y))
        gradient = linear_gradient((x_adv, error(p, y)))["layer_0"]
        delta[i] = project(x_adv + EPSILON * np.sign(error(p, y) @ w.T), x) - x
        w, b = w - 0.5 * gradient["kernel"], b - 0.5 * gradient["bias"]
    assert alike  # an example that is drawn twice counts twice, and moves once

    recipe, optimizer = remembered(), optax.sgd(0.5)
    state = init_inner(TASK, optimizer, KEY, recipe)._replace(params=PARAMS)
    run = jax.jit(functools.partial(
        unroll, TASK, optimizer, key=KEY, steps=3, inner_gradient=recipe
    ))  # fmt: skip
    found = []
    for _ in range(3):  # in pieces: the perturbations go from one to the next
        state, trajectory = run(state)
        found.append(trajectory.loss)
    np.testing.assert_allclose(np.concatenate(found), losses, rtol=1e-4)
    close(state.params, {"layer_0": {"kernel": w, "bias": b}})
    close(state.gradient_state.reshape(16, 4), delta)
    assert (abs(delta).max(axis=1) == 0).any()  # some were not drawn yet


def test_a_step_that_failed_is_not_remembered():
    recipe = remembered()
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), PARAMS)
    step = jax.jit(recipe.apply)
    loss, _, state = step(TASK, broken, KEY, recipe.init(TASK))
    assert np.isnan(loss)
    loss, gradient, state = step(TASK, PARAMS, KEY, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, gradient, state)))


def test_yopo_attacks_the_first_layer_with_the_rest_held_fixed():
    # z = x W0 + b0, logits = tanh(z) W1 + b1; d = (softmax - e_y) / n:
    # dW1 = tanh(z)^T d, db1 = sum d, p = dCE/dz = (d W1^T) (1 - tanh^2 z).
    # <p, f_0(x')> has the gradients p W0^T in x', x'^T p in W0 and sum p in b0.
    task = tiny_task(optimizees.mlp((5,), "tanh", 3))
    params = random_like(jax.eval_shape(lambda: task.optimizee.init(KEY, (2, 2, 1))), seed=1)
    (b0, w0), (b1, w1) = (params[k].values() for k in ("layer_0", "layer_1"))
    x, y, start_key = first_draw(task)
    x_j, losses, gradients = random_start(start_key, x), [], []
    for _ in range(3):
        h = np.tanh(x_j @ w0 + b0)
        q = softmax(h @ w1 + b1)
        d = error(q, y) / len(y)
        p = d @ w1.T * (1 - h**2)
        for _ in range(2):
            x_j = project(x_j + EPSILON / 4 * np.sign(p @ w0.T), x)
        losses.append(cross_entropy(q, y))
        gradients.append({"layer_0": {"bias": p.sum(axis=0), "kernel": x_j.T @ p},
                          "layer_1": {"bias": d.sum(axis=0), "kernel": h.T @ d}})  # fmt: skip
    expected = jax.tree.map(lambda *parts: np.mean(parts, axis=0), *gradients)
    loss, gradient = jax.jit(yopo(m=3, n=2))(task, params, KEY)
    close(gradient, expected)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


def test_yopo_needs_to_know_the_first_layer():
    init, apply = TASK.optimizee
    task = dataclasses.replace(
        TASK, optimizee=advmeta.Optimizee(init, lambda params, x: apply(params, x))
    )
    with pytest.raises(ValueError, match=r"write Optimizee\(init, .*Composed\(first, rest\)\)"):
        yopo()(task, PARAMS, KEY)


def test_remembered_needs_examples_that_it_can_add_to_and_their_own_state():
    x = np.uint8(255 * TASK.train.x)
    whole = dataclasses.replace(TASK, train=TASK.train._replace(x=x))
    with pytest.raises(ValueError, match=r"train.x is of uint8, .*write train._replace\(x="):
        remembered().init(whole)
    fewer = dataclasses.replace(TASK, train=Batch(TASK.train.x[:8], TASK.train.y[:8]))
    with pytest.raises(ValueError, match=r"perturbations of \(8, 2, 2, 1\), and the training set"):
        remembered().apply(TASK, PARAMS, KEY, remembered().init(fewer))
