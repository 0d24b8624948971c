"""Training recipes: each against its equation, what a step costs, and training with them."""

import collections
import dataclasses
import functools
import itertools

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
    kl,
    linear_gradient,
    predict,
    project,
)
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import random_like, tiny_family, tiny_task
from jax.extend.core import jaxprs_in_params

import advmeta
from advmeta import inner_gradients, optimizees
from advmeta.inner_gradients import RECIPES, fgsm_rs, free, remembered, stateful, trades, vat, yopo
from advmeta.inner_gradients.basic import ascend
from advmeta.inner_gradients.divergence import virtual_adversarial
from advmeta.meta_optimizer import MetaOptimizerConfig
from advmeta.meta_training_config import MetaTrainingConfig
from advmeta.outer_step import init_outer, outer_step
from advmeta.unroll import init_inner, unroll

# The equations.


def test_trades_is_cross_entropy_and_the_divergence_at_its_attacked_examples():
    # KL(p || q), p = softmax(z), q = softmax(z'): d / dz' = q - p, so d / dx' = W (q - p);
    # d / dz_k = p_k (log p_k / q_k - KL).
    x, y, start_key = first_draw()
    p = predict(x)
    noise = np.asarray(jax.random.normal(start_key, (len(x), 2, 2, 1))).reshape(x.shape)
    x_adv = project(x + 1e-3 * noise, x)
    for _ in range(10):
        x_adv = project(x_adv + 0.25 * EPSILON * np.sign((predict(x_adv) - p) @ W.T), x)
    q = predict(x_adv)
    divergence = kl(p, q)
    at_x = error(p, y) + 3 * p * (np.log(p / q) - divergence[:, None])
    expected = linear_gradient((x, at_x), (x_adv, 3 * (q - p)))

    loss, gradient = jax.jit(trades(beta=3.0, steps=10))(TASK, PARAMS, KEY)
    close(gradient, expected)
    np.testing.assert_allclose(loss, cross_entropy(p, y) + 3 * divergence.mean(), rtol=1e-5)
    # KL is convex in x', so its maximum is in one of the 16 corners of the box. The ascent ends
    # in one of them, and finds at least half of what there is.
    corners = [kl(p, predict(project(x + EPSILON * np.array(s), x)))
               for s in itertools.product((-1, 1), repeat=4)]  # fmt: skip
    assert abs(np.array(corners) - divergence).min(axis=0).max() < 1e-5
    assert (divergence >= 0.5 * np.max(corners, axis=0)).all()


WIDE_L2 = dataclasses.replace(
    TASK, threat_model=advmeta.ThreatModel("l2", EPSILON, bounds=(-9.0, 9.0))
)


@functools.cache
def virtual(iterations):
    return jax.jit(functools.partial(virtual_adversarial, iterations=iterations))


def test_virtual_adversarial_direction_of_two_classes_takes_one_iteration():
    # H = p_0 p_1 (w_0 - w_1)(w_0 - w_1)^T: whatever it is applied to, +-(w_0 - w_1) is left.
    task = dataclasses.replace(WIDE_L2, optimizee=optimizees.linear(2))
    params = {"layer_0": {"kernel": W[:, :2], "bias": B[:2]}}
    x = TASK.train.x[:4]
    move = np.asarray(virtual(1)(task, params, x, KEY) - x).reshape(4, 4)
    direction = (W[:, 0] - W[:, 1]) / np.linalg.norm(W[:, 0] - W[:, 1])
    close(abs(move @ direction), np.full(4, EPSILON))
    close(np.linalg.norm(move, axis=1), np.full(4, EPSILON))


def test_virtual_adversarial_direction_is_the_top_eigenvector():
    # Of a linear model H = W (diag p - p p^T) W^T, with a p of each example's own.
    x = TASK.train.x[:4]
    flat = x.reshape(4, 4)
    move = np.asarray(virtual(60)(WIDE_L2, PARAMS, x, KEY) - x).reshape(4, 4) / EPSILON
    for p, d in zip(predict(flat), move, strict=True):
        _, vectors = np.linalg.eigh(W @ (np.diag(p) - np.outer(p, p)) @ W.T)
        assert abs(vectors[:, -1] @ d) > 1 - 1e-4
    # In an linf ball the longest move that way is to a corner, cut to the bounds.
    moved = np.asarray(virtual(60)(TASK, PARAMS, x, KEY)).reshape(4, 4)
    close(moved, project(flat + EPSILON * np.sign(move), flat))


def test_vat_adds_the_divergence_from_fixed_predictions():
    # Only q = softmax(z') is differentiated: d KL(p || q) / dz' = q - p.
    x, y, start_key = first_draw()
    x_adv = np.asarray(virtual(1)(TASK, PARAMS, x.reshape(4, 2, 2, 1), start_key)).reshape(4, 4)
    p, q = predict(x), predict(x_adv)
    loss, gradient = jax.jit(vat(weight=2.0))(TASK, PARAMS, KEY)
    close(gradient, linear_gradient((x, error(p, y)), (x_adv, 2 * (q - p))))
    np.testing.assert_allclose(loss, cross_entropy(p, y) + 2 * kl(p, q).mean(), rtol=1e-5)


def test_nothing_is_differentiated_through_the_attacks():
    # In an l2 ball, where a move follows the gradient and not only its sign.
    x = WIDE_L2.train.x

    def moves(params):
        def objective(x):
            return (WIDE_L2.optimizee.apply(params, x)[:, 0] ** 3).sum()

        ascent = ascend(WIDE_L2.threat_model, objective, x, x, step_size=0.1, steps=1) - x
        virtual = virtual_adversarial(WIDE_L2, params, x, KEY, 1) - x
        _, _, kept = free().apply(WIDE_L2, params, KEY, free().init(WIDE_L2))
        _, _, deltas = remembered().apply(WIDE_L2, params, KEY, remembered().init(WIDE_L2))
        return sum(move[0, 0, 0, 0] for move in (ascent, virtual, kept.delta)) + deltas.sum()

    value, gradient = jax.jit(jax.value_and_grad(moves))(PARAMS)
    close(gradient, jax.tree.map(np.zeros_like, PARAMS), atol=0)
    assert abs(value) > 1e-4  # they did move


# The costs.


def backward_passes(jaxpr):
    """How often the loss's gradient d [4, 3] is taken to the hidden units, d W1^T [4, 5]."""
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            operands = {v.aval.shape for v in eqn.invars}
            count += operands == {(4, 3), (5, 3)} and eqn.outvars[0].aval.size == 4 * 5
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        count += times * sum(map(backward_passes, jaxprs_in_params(eqn.params)))
    return count


MLP = tiny_task(optimizees.mlp((5,), "tanh", 3), replay=TASK.train.x)


@pytest.mark.parametrize("name", RECIPES)
def test_gradient_evaluations_are_counted(name):
    recipe = RECIPES[name]
    gradient = stateful(recipe.inner_gradient)
    params = jax.eval_shape(lambda: MLP.optimizee.init(KEY, (2, 2, 1)))
    traced = jax.make_jaxpr(gradient.apply)(MLP, params, KEY, gradient.init(MLP))
    # `pgd` writes down a gradient at its last point too, for XLA to remove: nothing uses it.
    unused = 1 if name == "adversarial" else 0
    assert backward_passes(traced.jaxpr) == recipe.gradient_evaluations + unused


# Training with them.


STEPS = 3
TRACES = collections.Counter()


@functools.cache
def compiled(name):
    def run(task, state, key):
        TRACES[name] += 1
        recipe = RECIPES[name].inner_gradient
        return unroll(task, optax.adam(0.05), state, key, steps=STEPS, inner_gradient=recipe)

    return jax.jit(run)


@pytest.mark.parametrize("name", ["trades", "fgsm-rs", "free", "remembered", "yopo", "vat"])
def test_training_vmaps_and_compiles_once(name):
    keys = jax.random.split(KEY, 2)
    shapes = jax.eval_shape(
        lambda: init_inner(MLP, optax.adam(0.05), KEY, RECIPES[name].inner_gradient)
    )
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = state._replace(params=random_like(state.params))
    alone = [compiled(name)(MLP, state, key) for key in keys]
    other = dataclasses.replace(MLP, train=MLP.train._replace(x=1 - MLP.train.x))
    compiled(name)(other, alone[0][0], KEY)
    assert TRACES[name] == 1
    together = jax.jit(jax.vmap(compiled(name), in_axes=(None, None, 0)))(MLP, state, keys)
    for i in range(2):
        params, losses = together[0].params, together[1].loss
        close(jax.tree.map(lambda a, i=i: a[i], (params, losses)),
              (alone[i][0].params, alone[i][1].loss))  # fmt: skip
    assert abs(np.subtract(*together[1].loss)).max() > 1e-3  # or the keys would say little


@pytest.mark.parametrize(("name", "examples"), [("free", 4), ("remembered", 16)])
def test_a_state_can_be_carried_through_meta_training(name, examples):
    # Traced only: a scan over outer steps needs lanes that come out as they went in.
    config = MetaTrainingConfig(
        meta_optimizer=MetaOptimizerConfig(hidden=(2,)), inner_gradient=name, lanes=2,
        truncation=2, horizon=(4, 8),
    )  # fmt: skip
    families, outer = (tiny_family(MLP.optimizee),), optax.sgd(0.1)
    before = jax.eval_shape(lambda: init_outer(config, families, outer, KEY))
    after, _ = jax.eval_shape(lambda s: outer_step(config, outer, families, s), before)
    assert after.lanes == before.lanes
    state = before.lanes[0].inner.gradient_state
    delta = state.delta if name == "free" else state
    assert delta.shape == (2, examples, 2, 2, 1)


# What is refused.


def test_a_state_that_was_made_without_the_inner_gradient_is_refused():
    state = jax.eval_shape(lambda: init_inner(TASK, optax.sgd(0.1), KEY))
    with pytest.raises(ValueError, match=r"start from init_inner\(task, .*inner_gradient\)"):
        unroll(TASK, optax.sgd(0.1), state, KEY, steps=1, inner_gradient=free())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trades(steps=0), "steps=0: each must be at least 1"),
        (lambda: free(m=0), "m=0: each"),
        (lambda: yopo(m=5, n=0), "m=5, n=0: each"),
        (lambda: vat(iterations=0), "iterations=0: each"),
    ],
)
def test_counts_below_one(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_recipe_has_a_name():
    assert inner_gradients.by_name("fgsm-rs") is fgsm_rs
    assert inner_gradients.by_name("free") is RECIPES["free"].inner_gradient
    with pytest.raises(ValueError, match="'free', 'remembered', 'yopo', 'vat'"):
        inner_gradients.by_name("mart")
