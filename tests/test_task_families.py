import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import tiny_family, tiny_pool

import advmeta
from advmeta import optimizees
from advmeta.task_families import TaskConfig, TaskFamily, Variation
from advmeta.unroll import init_inner

LINEAR = optimizees.linear(3)
KEY = jax.random.key(0)


def rows(batch):
    return {tuple(row) for row in np.asarray(batch.x).reshape(len(batch.y), -1)}


def test_a_task_splits_the_pool_without_overlap():
    family = tiny_family(LINEAR)
    task = jax.jit(TaskFamily.sample)(family, KEY)
    assert len(task.train.y) == 16 and len(task.held_out.y) == 8
    assert rows(task.train) | rows(task.held_out) == rows(family.pool)
    assert not rows(task.train) & rows(task.held_out)


def test_labels_and_replayed_examples_go_with_their_images():
    pool = tiny_pool()
    family = tiny_family(LINEAR, pool, replay=pool.x + 1)
    task = jax.jit(TaskFamily.sample)(family, KEY)
    np.testing.assert_array_equal(task.replay, task.train.x + 1)
    for part in (task.train, task.held_out):
        brightest = np.asarray(part.x).reshape(len(part.y), -1)[:, :3].argmax(axis=1)
        np.testing.assert_array_equal(part.y, brightest)


def test_the_key_decides_the_task():
    sample = jax.jit(TaskFamily.sample)
    family = tiny_family(LINEAR)
    same, other = sample(family, KEY), sample(family, jax.random.key(1))
    np.testing.assert_array_equal(sample(family, KEY).train.x, same.train.x)
    assert rows(other.train) != rows(same.train)


def test_tasks_pass_through_vmap():
    family = tiny_family(LINEAR)
    keys = jax.random.split(KEY, 3)
    tasks = jax.jit(jax.vmap(TaskFamily.sample, in_axes=(None, 0)))(family, keys)
    assert tasks.train.x.shape == (3, 16, 2, 2, 1)
    assert tasks.optimizee is LINEAR and tasks.batch_size == 4
    one = jax.jit(TaskFamily.sample)(family, keys[2])
    np.testing.assert_array_equal(tasks.held_out.x[2], one.held_out.x)


def test_a_family_must_leave_something_to_hold_out():
    pool = tiny_pool(16)
    with pytest.raises(ValueError, match=r"train_examples=16 of a pool of 16 leave none.*=8"):
        tiny_family(LINEAR, pool)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"norm": "l0"}, r"norm='l0' is unknown; the known norms are \['linf', 'l2', 'l1'\]"),
        ({"epsilon": -0.1}, "epsilon=-0.1 must be finite and at least 0"),
        ({"optimizee": "vgg-16"}, "optimizee 'vgg-16' is unknown.*'mlp'.*'cnn'.*'resnet'"),
    ],
)
def test_bad_config(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TaskConfig(**kwargs)


def test_a_config_becomes_a_family():
    config = TaskConfig(optimizee="mlp-4-tanh", train_examples=200, norm="l2", epsilon=0.5)
    family = config.build()
    assert family.pool.x.shape == (1000, 8, 8, 1)  # the training part of digits, not its test part
    assert family.threat_model == advmeta.ThreatModel("l2", 0.5)
    assert family.optimizee is optimizees.by_name("mlp-4-tanh", 10)
    assert (family.train_examples, family.batch_size) == (200, 128)


def test_a_config_larger_than_its_data_set():
    with pytest.raises(ValueError, match="train_examples=1000 of a pool of 1000 leave none"):
        TaskConfig(train_examples=1000).build()


def sampled(count=400, **variation):
    family = tiny_family(LINEAR, variation=Variation(**variation))
    return jax.jit(jax.vmap(family.sample))(jax.random.split(KEY, count))


def test_without_variation_tasks_differ_in_their_examples_alone():
    tasks = sampled(3)
    np.testing.assert_array_equal(tasks.threat_model.epsilon, np.float32([0.1] * 3))
    np.testing.assert_array_equal(tasks.initial_scale, [1.0] * 3)
    np.testing.assert_array_equal(tasks.noise, [0.5] * 3)


@pytest.mark.parametrize("name", ["epsilon", "initial_scale"])
def test_a_factor_is_log_uniform(name):
    tasks = sampled(**{name: 3.0})
    found = tasks.threat_model.epsilon / 0.1 if name == "epsilon" else tasks.initial_scale
    logs = np.log(found) / np.log(3)
    # Uniform in [-1, 1]: mean 0 with deviation 1 / sqrt(3 * 400) = 0.029, a quarter below -1/2.
    assert -1 <= logs.min() < -0.97 and 0.97 < logs.max() <= 1
    assert abs(logs.mean()) < 4 * 0.029
    assert np.mean(logs < -0.5) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 400) ** 0.5)


def test_fewer_examples_are_repeated_in_place_of_the_others():
    tasks = sampled(train_examples=4.0)
    counts = np.array([len(np.unique(x.reshape(16, -1), axis=0)) for x in tasks.train.x])
    assert counts.min() in (4, 5) and counts.max() == 16
    assert tasks.train.x.shape[1] == 16 and tasks.held_out.x.shape[1] == 8
    few = counts.argmin()
    task = jax.tree.map(lambda leaf: leaf[few], tasks)
    assert not rows(task.train) & rows(task.held_out)
    np.testing.assert_array_equal(task.train.x[:4], task.train.x[counts[few] :][:4])


def test_noise_is_one_of_those_given():
    noise = np.asarray(sampled(noise=(0.0, 2.0)).noise)
    assert set(noise.tolist()) == {0.0, 2.0}
    assert abs((noise == 0).mean() - 0.5) < 4 * 0.025


def test_the_initial_scale_is_that_of_the_kernels():
    task = tiny_family(LINEAR).sample(KEY)
    larger = dataclasses.replace(task, initial_scale=3.0)
    one, three = (init_inner(t, optax.sgd(0.1), KEY).params["layer_0"] for t in (task, larger))
    np.testing.assert_allclose(three["kernel"], 3 * one["kernel"], rtol=1e-6)
    biases = optimizees.Optimizee(lambda key, shape: {"bias": jnp.ones(3)}, lambda p, x: p["bias"])
    biased = dataclasses.replace(
        larger, optimizee=biases._replace(apply=lambda p, x: p["bias"] + 0 * x[:, 0, 0, :1])
    )
    np.testing.assert_array_equal(
        init_inner(biased, optax.sgd(0.1), KEY).params["bias"], np.ones(3)
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"epsilon": 0.5}, "epsilon=0.5 is the largest factor.*write 1.0 for none"),
        ({"initial_scale": float("nan")}, "initial_scale=nan is the largest factor"),
        ({"train_examples": float("inf")}, "train_examples=inf is the largest factor"),
        ({"noise": ()}, r"noise=\(\) must hold one number or more"),
        ({"noise": (-1.0,)}, "none below 0"),
    ],
)
def test_bad_variation(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Variation(**kwargs)


def test_classes_are_kept_and_numbered_anew():
    family = TaskConfig(classes=(7, 3, 8), train_examples=100, batch_size=32).build()
    digits = advmeta.data.load("digits").train
    for place, label in enumerate((7, 3, 8)):
        expected = digits.x[np.asarray(digits.y) == label]
        np.testing.assert_array_equal(family.pool.x[np.asarray(family.pool.y) == place], expected)
    assert len(family.pool.y) == int(np.isin(digits.y, (3, 7, 8)).sum())
    assert family.optimizee is optimizees.by_name("mlp-20", 3)


def test_images_are_cropped_and_resized():
    digits = advmeta.data.load("digits").train
    cropped = TaskConfig(crop=4).build().pool.x
    np.testing.assert_array_equal(cropped, digits.x[:, 2:6, 2:6])
    # Half the size, antialiased: a triangle of weights 1 3 3 1 (over 8) on each axis, inside.
    half = np.asarray(TaskConfig(side=4).build().pool.x)[..., 0]
    weights = np.array([1, 3, 3, 1]) / 8
    expected = np.einsum("i,nij,j->n", weights, digits.x[:, 1:5, 3:7, 0], weights)
    np.testing.assert_allclose(half[:, 1, 2], expected, atol=1e-6)
    assert TaskConfig(crop=4, side=10, optimizee="cnn-2").build().pool.x.shape[1:] == (10, 10, 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"classes": (1,)}, r"classes=\(1,\) must be two labels or more"),
        ({"classes": (1, 1)}, "none twice"),
        ({"classes": (1, 12)}, r"no training example of \[12\]"),
        ({"classes": (1, 2)}, r"train_examples=500 of a pool of \d+ leave none"),
        ({"crop": 9}, "crop=9 is more than the images' 8 x 8 pixels"),
        ({"side": 0}, "side=0: both are pixels, at least 1"),
    ],
)
def test_pools_that_cannot_be(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TaskConfig(**kwargs).build()
