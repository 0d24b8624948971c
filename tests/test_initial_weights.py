"""A meta-training that begins with weights that are there already."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import random_meta_params, tiny_family

import advmeta
from advmeta import optimizees
from advmeta.meta_loss import MetaLossConfig
from advmeta.meta_training import meta_train, training_states
from advmeta.meta_training_config import MetaTrainingConfig

KEY = jax.random.key(0)
SMALL = advmeta.MetaOptimizerConfig(hidden=(2,))
FAMILY = tiny_family(optimizees.mlp((3,), num_classes=3))
CONFIG = MetaTrainingConfig(
    meta_optimizer=SMALL, meta_loss=MetaLossConfig(attack_steps=1, every=1),
    outer_steps=2, lanes=2, truncation=2, horizon=(2, 2), evaluate_every=1,
)  # fmt: skip


@pytest.fixture
def given(tmp_path):
    """Weights, and the config of a training that begins with them and has another rate."""
    phi = random_meta_params(SMALL)
    advmeta.save_weights(tmp_path / "given.safetensors", phi, SMALL)
    rule = dataclasses.replace(SMALL, learning_rate=0.1)
    config = dataclasses.replace(
        CONFIG, initial=str(tmp_path / "given.safetensors"), meta_optimizer=rule
    )
    return phi, config


def run(config, outer_optimizer):
    return meta_train(
        config, key=KEY, families=(FAMILY,), selection=(FAMILY,), outer_optimizer=outer_optimizer
    )


def test_it_begins_with_what_it_is_given_and_learns_on(given):
    phi, config = given
    begun = next(training_states(config, key=KEY, families=(FAMILY,), selection=(FAMILY,)))
    jax.tree.map(np.testing.assert_array_equal, begun.outer.meta_params, phi)
    jax.tree.map(np.testing.assert_array_equal, begun.outer.average, phi)
    learned, _ = run(config, optax.adam(0.01))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), learned, phi)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1
    fresh = next(training_states(CONFIG, key=KEY, families=(FAMILY,), selection=(FAMILY,)))
    assert not np.array_equal(fresh.outer.meta_params["linear"]["shared_0"]["kernel"],
                              phi["linear"]["shared_0"]["kernel"])  # fmt: skip


def test_initial_weights_must_be_there_and_fit(given):
    _, config = given
    large = dataclasses.replace(config.meta_optimizer, hidden=(3,))
    with pytest.raises(ValueError, match="but the config needs"):
        run(dataclasses.replace(config, meta_optimizer=large), optax.sgd(0.0))
    with pytest.raises(ValueError, match=r"'mixtur' is unknown; the known ones are \['mixture'"):
        run(dataclasses.replace(config, initial="mixtur"), optax.sgd(0.0))
