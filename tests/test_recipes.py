"""Training recipes: each against its equation, what a step costs, and training with them."""

import collections
import dataclasses
import functools
import itertools

import jax
import numpy as np
import optax
import pytest
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import random_like, tiny_family, tiny_task
from jax.extend.core import jaxprs_in_params

import advmeta
from advmeta import inner_gradients, optimizees
from advmeta.inner_gradients import RECIPES, fgsm_rs, free, stateful, trades, vat, yopo
from advmeta.inner_gradients.basic import ascend
from advmeta.inner_gradients.divergence import virtual_adversarial
from advmeta.meta_optimizer import MetaOptimizerConfig
from advmeta.meta_training_config import MetaTrainingConfig
from advmeta.outer_step import init_outer, outer_step
from advmeta.tasks import draw
from advmeta.unroll import init_inner, unroll

KEY = jax.random.key(0)
EPSILON = 0.1
TASK = tiny_task(optimizees.linear(3))
W, B = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((4, 3), (3,)))
PARAMS = {"layer_0": {"kernel": W, "bias": B}}


def close(a, b, atol=1e-5):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-4, atol=atol), a, b)


def first_draw(task=TASK):
    """The batch, flat, and the key of the start, of a recipe that is called with KEY."""
    draw_key, start_key = jax.random.split(KEY)
    x, y = draw(task.train, draw_key, task.batch_size)
    return np.asarray(x).reshape(len(y), -1), np.asarray(y), start_key


def random_start(start_key, x, task=TASK):
    images = x.reshape(-1, 2, 2, 1)
    start = task.threat_model.random_start(jax.random.split(start_key, len(x)), images)
    return np.asarray(start).reshape(x.shape)


def softmax(logits):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def predict(x, w=W, b=B):
    return softmax(x @ w + b)


def error(p, y):
    """d CE / d logits = p - e_y."""
    return p - np.eye(p.shape[1])[y]


def cross_entropy(p, y):
    return -np.log(p[np.arange(len(y)), y]).mean()


def kl(p, q):
    return (p * np.log(p / q)).sum(axis=1)


def project(x_adv, x):
    return np.clip(x + np.clip(x_adv - x, -EPSILON, EPSILON), 0, 1)


def linear_gradient(*parts):
    """Of the linear model, from pairs (x, d loss / d logits at x): dW = x^T d, db = sum d."""
    return {
        "layer_0": {
            "kernel": sum(x.T @ d for x, d in parts) / len(parts[0][0]),
            "bias": sum(d.sum(axis=0) for _, d in parts) / len(parts[0][0]),
        }
    }


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
        remembering = free()
        delta = remembering.apply(WIDE_L2, params, KEY, remembering.init(WIDE_L2))[-1].delta
        return sum(move[0, 0, 0, 0] for move in (ascent, virtual, delta))

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


@pytest.mark.parametrize("name", ["trades", "fgsm-rs", "free", "yopo", "vat"])
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


def test_a_state_can_be_carried_through_meta_training():
    # Traced only: a scan over outer steps needs lanes that come out as they went in.
    config = MetaTrainingConfig(
        meta_optimizer=MetaOptimizerConfig(hidden=(2,)), inner_gradient="free", lanes=2,
        truncation=2, horizon=(4, 8),
    )  # fmt: skip
    families, outer = (tiny_family(MLP.optimizee),), optax.sgd(0.1)
    before = jax.eval_shape(lambda: init_outer(config, families, outer, KEY))
    after, _ = jax.eval_shape(lambda s: outer_step(config, outer, families, s), before)
    assert after.lanes == before.lanes
    assert before.lanes[0].inner.gradient_state.delta.shape == (2, 4, 2, 2, 1)


# What is refused.


def test_a_state_that_was_made_without_the_inner_gradient_is_refused():
    state = jax.eval_shape(lambda: init_inner(TASK, optax.sgd(0.1), KEY))
    with pytest.raises(ValueError, match=r"start from init_inner\(task, .*inner_gradient\)"):
        unroll(TASK, optax.sgd(0.1), state, KEY, steps=1, inner_gradient=free())


def test_yopo_needs_to_know_the_first_layer():
    init, apply = TASK.optimizee
    task = dataclasses.replace(
        TASK, optimizee=advmeta.Optimizee(init, lambda params, x: apply(params, x))
    )
    with pytest.raises(ValueError, match=r"write Optimizee\(init, .*Composed\(first, rest\)\)"):
        yopo()(task, PARAMS, KEY)


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
    with pytest.raises(ValueError, match="'trades', 'fgsm-rs', 'free', 'yopo', 'vat'"):
        inner_gradients.by_name("mart")
