import dataclasses

import jax
import numpy as np
import pytest
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import tiny_family, tiny_pool, tiny_task

import advmeta
from advmeta import optimizees
from advmeta.tasks import Task, TaskConfig, TaskFamily, draw, take

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


def test_draw_takes_every_example_equally_often():
    # 6,400 draws from 16: 400 each, with a standard deviation of sqrt(6400 / 16 * 15 / 16) = 19.4.
    task = tiny_task(LINEAR)
    batch = jax.jit(draw, static_argnums=2)(task.train, KEY, 6400)
    _, counts = np.unique(np.asarray(batch.x[:, 0, 0, 0]), return_counts=True)
    assert len(counts) == 16
    assert abs(counts - 400).max() < 5 * 19.4


def test_take():
    pool = tiny_pool()
    taken = take(pool, np.array([5, 2]))
    np.testing.assert_array_equal(taken.x, pool.x[[5, 2]])
    np.testing.assert_array_equal(taken.y, pool.y[[5, 2]])


@pytest.mark.parametrize("batch_size", [0, 17])
def test_batch_must_fit_the_training_set(batch_size):
    message = f"batch_size={batch_size} must be between 1 and the training set's 16 examples"
    with pytest.raises(ValueError, match=message):
        tiny_task(LINEAR, batch_size=batch_size)
    with pytest.raises(ValueError, match=message):
        tiny_family(LINEAR, batch_size=batch_size)
    with pytest.raises(ValueError, match=message):
        TaskConfig(train_examples=16, batch_size=batch_size)


def test_a_family_must_leave_something_to_hold_out():
    pool = tiny_pool(16)
    with pytest.raises(ValueError, match=r"train_examples=16 of a pool of 16 leave none.*=8"):
        tiny_family(LINEAR, pool)


def test_a_task_survives_what_jax_does_to_pytrees():
    task = tiny_task(LINEAR)
    assert jax.tree.structure(jax.tree.map(lambda _: object(), task)) == jax.tree.structure(task)
    assert isinstance(dataclasses.replace(task, batch_size=8), Task)


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
