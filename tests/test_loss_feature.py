"""The loss as a feature: what the meta-optimizer sees of it, and how it comes to it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import random_like, random_meta_params

from advmeta.meta_optimizer import MetaOptimizerConfig, features, scale_by_meta_optimizer
from advmeta.meta_optimizer.layers import layer_positions

CONFIG = MetaOptimizerConfig((2,), ("adam", "loss"))
PARAMS = random_like({"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)})
GRADIENT = random_like(PARAMS, seed=1)
OURS = scale_by_meta_optimizer(random_meta_params(CONFIG), CONFIG)


def update(optimizer, **loss):
    return jax.jit(optimizer.update)(GRADIENT, optimizer.init(PARAMS), PARAMS, **loss)[0]


def assert_close(a, b):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-6), a, b)


@pytest.mark.parametrize(
    ("outputs", "guess"),
    [(10, np.log(10)), (1, np.log(2)), (None, np.log(2))],  # k outputs; one is a choice of two
)
def test_the_loss_in_units_of_that_of_a_guess(outputs, guess):
    # log(l / (0.3 log k) + 0.1): 0.3 of a guess is log 1.1, a loss of zero or below log 0.1.
    kernels = [] if outputs is None else [jnp.ones((4, 7)), jnp.ones((7, outputs))]
    positions = layer_positions(kernels)
    for share, expected in ((0.3, 1.1), (1.0, 1 / 0.3 + 0.1), (0.0, 0.1), (-2.0, 0.1)):
        found = features.loss_features(jnp.float32(share * guess), positions)
        np.testing.assert_allclose(found, [np.log(expected)], rtol=1e-5)


def test_it_comes_through_what_optax_wraps_around():
    low, high = (update(OURS, value=np.float32(loss)) for loss in (0.1, 3.0))
    differences = jax.tree.map(lambda a, b: abs(a - b).max(), low, high)
    assert min(jax.tree.leaves(differences)) > 1e-4
    for wrapped in (
        optax.chain(optax.clip_by_global_norm(1e6), OURS),
        optax.MultiSteps(OURS, 1),
        optax.apply_if_finite(OURS, 2),
        optax.masked(OURS, jax.tree.map(lambda _: True, PARAMS)),
    ):
        assert_close(update(wrapped, value=np.float32(3.0)), high)


def test_a_loss_that_is_not_told_is_a_typical_one():
    # log(l / (0.3 log k) + 0.1) is zero at l = 0.27 log k, with k = 3 outputs of the last layer.
    assert_close(update(OURS), update(OURS, value=np.float32(0.27 * np.log(3))))
