import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import random_like, tiny_task

import advmeta
from advmeta import inner_gradients, optimizees
from advmeta.inner_gradients import adversarial, attacked, clean, noisy, replayed
from advmeta.inner_gradients.basic import seen_noise
from advmeta.tasks import draw
from advmeta.types import Batch

KEY = jax.random.key(0)
TASK = tiny_task(optimizees.linear(3))
PARAMS = random_like({"layer_0": {"bias": np.zeros(3, np.float32),
                                  "kernel": np.zeros((4, 3), np.float32)}})  # fmt: skip


def close(a, b, atol=1e-5):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, atol=atol), a, b)


def softmax_regression(x, y):
    """Loss and gradient of the linear model, written out.

    Of -log p_y with p = softmax(W x + b): d / d logits = p - e_y, so db = p - e_y
    and dW = x (p - e_y)^T.
    """
    x = np.asarray(x).reshape(len(y), -1)
    logits = x @ PARAMS["layer_0"]["kernel"] + PARAMS["layer_0"]["bias"]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    error = p - np.eye(3)[np.asarray(y)]
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    return loss, {"layer_0": {"bias": error.mean(axis=0), "kernel": x.T @ error / len(y)}}


def test_clean_is_the_gradient_of_the_mean_cross_entropy():
    batch = draw(TASK.train, KEY, TASK.batch_size)
    close(jax.jit(clean)(TASK, PARAMS, KEY), softmax_regression(*batch))


def test_adversarial_is_the_gradient_on_the_attacked_batch():
    draw_key, attack_key = jax.random.split(KEY)
    batch = draw(TASK.train, draw_key, TASK.batch_size)
    moved = jax.jit(attacked, static_argnums=4)(TASK, PARAMS, batch, attack_key, 3)
    found = jax.jit(adversarial(steps=3))(TASK, PARAMS, KEY)
    close(found, softmax_regression(*moved))
    assert found[0] > softmax_regression(*batch)[0] + 0.01


def test_attacked_moves_each_example_within_its_ball():
    moved = jax.jit(attacked, static_argnums=4)(TASK, PARAMS, TASK.train, KEY, 3)
    distance = TASK.threat_model.distance(TASK.train.x, moved.x)
    assert distance.max() <= 0.1 * (1 + 1e-5) and distance.min() > 0
    np.testing.assert_array_equal(moved.y, TASK.train.y)
    assert softmax_regression(*moved)[0] > softmax_regression(*TASK.train)[0] + 0.01


def test_nothing_is_differentiated_through_the_attack():
    def objective(params):
        return attacked(TASK, params, TASK.train, KEY, 2).x.sum()

    close(jax.jit(jax.grad(objective))(PARAMS), jax.tree.map(np.zeros_like, PARAMS), atol=0)


def test_replayed_examples_take_the_place_of_the_clean_ones():
    moved = 1 - TASK.train.x
    task = tiny_task(TASK.optimizee, replay=moved)
    batch = draw(task.train._replace(x=moved), KEY, task.batch_size)
    close(jax.jit(replayed)(task, PARAMS, KEY), softmax_regression(*batch))


def test_a_name_is_not_yet_a_function():
    with pytest.raises(ValueError, match=r"is a name: write .*by_name\('clean'\)"):
        advmeta.train(TASK, optax.sgd(0.1), KEY, steps=1, inner_gradient="clean")


def test_without_noise_it_is_the_clean_gradient():
    batch = draw(TASK.train, jax.random.split(KEY)[0], TASK.batch_size)
    still, loud = (dataclasses.replace(TASK, noise=noise) for noise in (0.0, 100.0))
    close(jax.jit(noisy)(still, PARAMS, KEY), softmax_regression(*batch))
    _, gradient = jax.jit(noisy)(loud, PARAMS, KEY)
    moved = gradient["layer_0"]["kernel"] - softmax_regression(*batch)[1]["layer_0"]["kernel"]
    assert jnp.abs(moved).max() > 0.01


@pytest.mark.parametrize(("norm", "epsilon"), [("l2", 0.4), ("linf", 0.2)])
def test_noise_is_half_of_what_the_threat_model_allows_in_l2_and_not_clipped(norm, epsilon):
    # Examples of d = 4 zeros, the lower bound, and a model that gives its input: of logits z the
    # gradient in the bias b = 0 is softmax(z) - e_y, which tells z. Each value's deviation is half
    # of 0.4, which is 0.2 sqrt(4); clipped it would be 0.12.
    ball = advmeta.ThreatModel(norm, epsilon, (0.0, 1.0))
    model = advmeta.Optimizee(lambda key, shape: jnp.zeros(4), lambda b, x: x.reshape(-1, 4) + b)
    zeros = Batch(jnp.zeros((512, 2, 2, 1)), jnp.zeros(512, jnp.int32))
    task = advmeta.Task(zeros, zeros, ball, model, batch_size=1)

    def centred(key):
        _, gradient = noisy(task, jnp.zeros(4), key)
        log = jnp.log(gradient.at[0].add(1.0))
        return log - log.mean()

    found = jax.jit(jax.vmap(centred))(jax.random.split(KEY, 2000))
    # Taking the mean of 4 away leaves 3/4 of the variance; 6,000 degrees of freedom: 1 % of 0.173.
    assert float(found.std()) == pytest.approx(0.2 * 0.75**0.5, rel=0.04)


def test_noise_that_the_first_layer_does_not_see_is_left_out():
    """The gradient's mean is that with all of the noise, and its variance is lower."""
    task = tiny_task(optimizees.mlp((2,), "tanh", 3), noise=2.0, batch_size=8)
    init, apply = task.optimizee
    unknown = advmeta.Optimizee(init, lambda params, x: apply(params, x))
    params = random_like(jax.eval_shape(lambda: init(KEY, (2, 2, 1))), seed=1)

    def kernels(task):
        keys = jax.random.split(KEY, 20_000)
        _, gradients = jax.jit(jax.vmap(lambda key: noisy(task, params, key)))(keys)
        return gradients["layer_0"]["kernel"].reshape(len(keys), -1)

    part, whole = kernels(task), kernels(dataclasses.replace(task, optimizee=unknown))
    error = jnp.sqrt((part.var(axis=0) + whole.var(axis=0)) / len(part))
    assert jnp.abs((part.mean(axis=0) - whole.mean(axis=0)) / error).max() < 4
    assert (part.var(axis=0) < whole.var(axis=0)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_seen_noise_lies_in_what_the_kernel_spans_and_moves_it_as_the_whole_does(dtype):
    w = jax.random.normal(KEY, (4, 2))
    task = tiny_task(optimizees.linear(2))
    params = {"layer_0": {"kernel": w.astype(dtype), "bias": jnp.ones(2, dtype)}}
    noise = seen_noise(task, params, jnp.ones((20_000, 2, 2, 1), dtype), KEY)
    assert noise.dtype == dtype
    noise = noise.reshape(-1, 4).astype(jnp.float32)
    span = w @ jnp.linalg.pinv(w)
    atol = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(noise @ span, noise, atol=atol)
    # Of 20,000 draws a variance is known to 1 %.
    np.testing.assert_allclose(jnp.cov(noise.T), span, atol=0.05)


@pytest.mark.parametrize(
    ("optimizee", "examples"),
    [
        (optimizees.linear(4), 64),  # it sees everything
        (optimizees.linear(2), 7),  # finding the part takes longer than it saves
        (optimizees.cnn((4,), num_classes=3), 64),
        (advmeta.Optimizee(None, lambda params, x: x.reshape(-1, 4)[:, :2]), 64),  # not known
    ],
)
def test_noise_stays_whole(optimizee, examples):
    x = jnp.ones((examples, 2, 2, 1))
    params = optimizee.init(KEY, (2, 2, 1)) if optimizee.init else None
    noise = seen_noise(tiny_task(optimizee), params, x, KEY)
    np.testing.assert_array_equal(noise, jax.random.normal(KEY, x.shape))


def test_replay_must_be_there():
    with pytest.raises(ValueError, match=r"no replayed examples.*with_replay\(task, key\)"):
        replayed(TASK, PARAMS, KEY)


def test_names():
    assert inner_gradients.by_name("clean") is clean
    assert inner_gradients.by_name("replayed") is replayed
    with pytest.raises(ValueError, match=r"'noise' is unknown; .*'clean', 'noisy', 'adversarial'"):
        inner_gradients.by_name("noise")
