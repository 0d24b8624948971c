"""Learning curves: the path that they are read from."""

import operator

import jax
import numpy as np
import optax
import pytest
from fixtures.tiny import compile_fast as compile_fast

from advmeta import data, optimizees
from advmeta.attacks.threat_model import ThreatModel
from advmeta.evaluation.curves import learning_steps, train_and_keep
from advmeta.inner_gradients import clean
from advmeta.tasks import Task
from advmeta.unroll import train


@pytest.mark.parametrize("steps, first, second", [(1, 1, None), (7, 1, 2), (43, 3, 5)])
def test_steps_at_which_a_training_is_looked_at(steps, first, second):
    looks = learning_steps(steps)
    assert looks[0] == first and looks[-1] == steps
    assert second is None or looks[1] == second
    assert len(looks) <= 40


def test_the_path_ends_where_train_does_and_passes_where_it_does():
    # 43 steps: three first, for the rest to be a multiple of two.
    digits = data.load("digits", train_examples=100)
    task = Task(digits.train, digits.test, ThreatModel(), optimizees.linear(), batch_size=32)
    optimizer, key = optax.adam(1e-2), jax.random.key(0)
    path = train_and_keep(task, optimizer, key, steps=43, inner_gradient=clean)
    for steps in (43, 5):
        params, _ = train(task, optimizer, key, steps=steps)
        at = jax.tree.map(operator.itemgetter(learning_steps(43).index(steps)), path)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), at, params)
