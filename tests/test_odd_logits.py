"""Attacks on models whose logits or gradients are half precision, NaN or very small."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.tiny import compile_fast as compile_fast

import advmeta
from advmeta import attacks

KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), (12, 4, 4, 1))
W = jax.random.normal(jax.random.key(2), (16, 5))


def linear(x):
    return x.reshape(len(x), -1) @ W


Y = linear(X).argmax(axis=1)
ATTACKS = {
    "fgsm": attacks.fgsm,
    "pgd": partial(attacks.pgd, steps=3),
    "apgd": partial(attacks.apgd, steps=3),
    "apgd-t": partial(attacks.apgd, steps=3, loss="dlr", target_ranks=(2,)),
    "fab": partial(attacks.fab, steps=2),
    "square": partial(attacks.square, queries=10),
    "multi-targeted": partial(attacks.multi_targeted, steps=3, target_ranks=(2,)),
}


@pytest.mark.parametrize(("name", "norm"), [*((name, "linf") for name in ATTACKS), ("apgd", "l2")])
def test_a_model_of_half_precision_is_attacked_as_another(name, norm):
    ball = advmeta.ThreatModel(norm, 0.3)

    def model(x):
        return linear(x).astype(jnp.bfloat16)

    result = ATTACKS[name](model, X, Y, threat_model=ball, key=KEY)
    assert result.loss.dtype == result.x_adv.dtype == jnp.float32
    moved = model(result.x_adv).astype(jnp.float32).argmax(axis=1) != Y
    np.testing.assert_array_equal(result.is_adversarial, moved)


@pytest.mark.parametrize("name", ["pgd", "apgd", "square"])
def test_an_example_whose_logits_become_nan_is_misclassified_whatever_its_label(name):
    def brittle(x):
        off = jnp.abs(x - X).max(axis=(1, 2, 3)) > 1e-6
        right = jnp.zeros((len(x), 5)).at[:, 0].set(1) + 0 * linear(x)
        return jnp.where(off[:, None], jnp.nan, right)

    zeros, ball = jnp.zeros(len(X), int), advmeta.ThreatModel("linf", 0.1)
    result = ATTACKS[name](brittle, X, zeros, threat_model=ball, key=KEY)
    if name != "apgd":  # which does not leave x without a gradient
        assert result.is_adversarial.all()
    np.testing.assert_array_equal(
        result.is_adversarial, jnp.isnan(brittle(result.x_adv)).any(axis=1)
    )


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_gradient_that_is_nan_moves_nothing_and_the_rest_all_the_same(norm):
    x = X.at[:, 0].set(0.0)

    def cropped(x):
        return jnp.sqrt(x[:, 1:]).reshape(len(x), -1) @ W[4:]

    def whole(x):  # 0 times inf: the root's gradient at the pixels that are cut off
        return jnp.sqrt(x)[:, 1:].reshape(len(x), -1) @ W[4:]

    ball = advmeta.ThreatModel(norm, 0.2)
    options = {"threat_model": ball, "key": KEY, "steps": 5, "x_init": x}
    y = cropped(x).argmax(axis=1)
    expected, found = (attacks.pgd(model, x, y, **options) for model in (cropped, whole))
    assert not jnp.isnan(found.x_adv).any()
    np.testing.assert_array_equal(found.is_adversarial, expected.is_adversarial)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_steepest_direction_has_length_1_however_small_or_large_the_gradient(norm):
    ball = advmeta.ThreatModel(norm, 0.1)
    gradient = jax.random.normal(KEY, (3, 7))
    expected = ball.steepest(gradient)
    for size in (2.0**-120, 2.0**-40, 2.0**100):  # the squares of these are no float32
        np.testing.assert_array_equal(ball.steepest(size * gradient), expected)
    np.testing.assert_array_equal(ball.steepest(jnp.zeros((3, 7))), 0)
