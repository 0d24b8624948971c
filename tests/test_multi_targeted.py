import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import linear, linear_problem, load_images, load_model
from jax.tree_util import Partial

import advmeta
from advmeta.attacks import multi_targeted

KEY = jax.random.key(0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_model_is_broken_exactly_where_the_boundary_is_within_epsilon(norm):
    # Towards its own class each run is a linear programme; 5 classes, and none is left out.
    params, x, y, distance = linear_problem(norm)
    for epsilon in (0.99 * distance, 1.01 * distance):
        result = multi_targeted(
            Partial(linear, params), x, y, threat_model=advmeta.ThreatModel(norm, epsilon), key=KEY
        )
        np.testing.assert_array_equal(result.is_adversarial, epsilon > distance)
    assert result.note == ""


def test_points_stay_in_the_ball_and_the_bounds_and_order_does_not_matter():
    x, y = load_images()
    x, y = x[:20], y[:20]
    logits_fn = Partial(*load_model("fashion_mlp_at"))
    epsilon = np.linspace(0, 0.2, 20).astype(np.float32)
    threat_model = advmeta.ThreatModel("linf", epsilon)
    result = multi_targeted(logits_fn, x, y, threat_model=threat_model, key=KEY)
    assert (threat_model.distance(x, result.x_adv) <= epsilon + 1e-6).all()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    misclassified = logits_fn(result.x_adv).argmax(axis=1) != y
    np.testing.assert_array_equal(result.is_adversarial, misclassified)
    assert 0 < misclassified.sum() < 20
    order = np.random.default_rng(0).permutation(20)
    shuffled = multi_targeted(
        logits_fn, x[order], y[order], key=KEY,
        threat_model=advmeta.ThreatModel("linf", epsilon[order]),
    )  # fmt: skip
    np.testing.assert_array_equal(shuffled.is_adversarial, result.is_adversarial[order])


def test_randomized_models_are_averaged():
    params, x, y, distance = linear_problem("l2", n=16)

    def noisy(x, key):
        shaken = x @ (3 * jax.random.normal(key, params["weight"].shape))
        return linear(params, x) + shaken - jax.lax.stop_gradient(shaken)

    result = multi_targeted(
        noisy, x, y, key=KEY, eot_samples=40, steps=8,
        threat_model=advmeta.ThreatModel("l2", 1.5 * distance),
    )  # fmt: skip
    assert result.is_adversarial.all()


def test_what_cannot_be_says_what_to_write():
    x, y = jnp.array([[0.6, 0.5]]), jnp.array([0])
    with pytest.raises(ValueError, match="steps=0, restarts=1: each must be at least 1"):
        multi_targeted(lambda x: x, x, y, threat_model=advmeta.ThreatModel(), key=KEY, steps=0)
    with pytest.raises(ValueError, match="rank 1 is the class that the model predicts"):
        multi_targeted(
            lambda x: x, x, y, threat_model=advmeta.ThreatModel(), key=KEY, target_ranks=[1]
        )
