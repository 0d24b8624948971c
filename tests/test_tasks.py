import dataclasses

import jax
import numpy as np
import pytest
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import tiny_family, tiny_pool, tiny_task

from advmeta import optimizees
from advmeta.task_families import TaskConfig
from advmeta.tasks import Task, draw, take

LINEAR = optimizees.linear(3)
KEY = jax.random.key(0)


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


@pytest.mark.parametrize("wrong", [tuple, list])
def test_examples_must_be_a_batch(wrong):
    task, family = tiny_task(LINEAR), tiny_family(LINEAR)
    message = rf"given as a {wrong.__name__} of 2: write advmeta.Batch\(x, y\)"
    for part in ("train", "held_out"):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(task, **{part: wrong(getattr(task, part))})
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(family, pool=wrong(family.pool))


def test_a_task_survives_what_jax_does_to_pytrees():
    task = tiny_task(LINEAR)
    assert jax.tree.structure(jax.tree.map(lambda _: object(), task)) == jax.tree.structure(task)
    assert isinstance(dataclasses.replace(task, batch_size=8), Task)
