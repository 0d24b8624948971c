import jax
import jax.numpy as jnp
import numpy as np
import pytest

import advmeta
from advmeta.attacks import average_logits, gaussian_noise, uniform_noise

KEY = jax.random.key(0)


def threshold(x):
    """Class 1 where the first value exceeds 0.59."""
    return jnp.stack([0.59 - x[:, 0], x[:, 0] - 0.59], axis=1)


@pytest.mark.parametrize(
    ("attack", "probability"),
    [
        # u in [-0.1, 0.1] exceeds 0.09 for a twentieth of its range.
        (uniform_noise, 0.05),
        # g ~ N(0, 0.1^2) exceeds 0.09 with probability 1 - Phi(0.9).
        (gaussian_noise, 0.18406),
    ],
)
def test_one_draw_succeeds_as_often_as_it_must(attack, probability):
    n = 4000
    x = 0.5 + jnp.linspace(0, 1e-3, n)[:, None]  # no two alike, or they would draw alike
    far = x - 0.5e-3
    result = attack(
        threshold, far, jnp.zeros(n, int), threat_model=advmeta.ThreatModel("linf", 0.1),
        key=KEY, samples=1,
    )  # fmt: skip
    error = np.sqrt(probability * (1 - probability) / n)
    assert abs(result.is_adversarial.mean() - probability) < 4 * error
    # Samples are independent: all of them fail with the power of one's probability.
    many = attack(
        threshold, far, jnp.zeros(n, int), threat_model=advmeta.ThreatModel("linf", 0.1),
        key=KEY, samples=10,
    )  # fmt: skip
    assert abs(1 - many.is_adversarial.mean() - (1 - probability) ** 10) < 0.04


@pytest.mark.parametrize(
    ("attack", "norm"), [(uniform_noise, "linf"), (gaussian_noise, "l2"), (gaussian_noise, "l1")]
)
def test_points_stay_in_the_ball_and_the_bounds(attack, norm):
    x = jax.random.uniform(KEY, [30, 6, 6, 1]).round()
    epsilon = np.linspace(0, 2, 30).astype(np.float32)
    threat_model = advmeta.ThreatModel(norm, epsilon)
    logits_fn = lambda x: x.reshape(x.shape[0], -1)[:, :3]  # noqa: E731
    y = logits_fn(x).argmax(axis=1)
    result = attack(logits_fn, x, y, threat_model=threat_model, key=KEY, samples=20)
    distance = threat_model.distance(x, result.x_adv)
    assert (distance <= epsilon * (1 + 1e-6)).all() and (distance[1:] > 0).all()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    misclassified = logits_fn(result.x_adv).argmax(axis=1) != y
    np.testing.assert_array_equal(result.is_adversarial, misclassified)
    order = np.random.default_rng(0).permutation(30)
    shuffled = attack(
        logits_fn, x[order], y[order], threat_model=advmeta.ThreatModel(norm, epsilon[order]),
        key=KEY, samples=20,
    )  # fmt: skip
    np.testing.assert_array_equal(shuffled.x_adv, result.x_adv[order])


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="samples=0: each must be at least 1"):
        uniform_noise(
            threshold, jnp.ones([1, 1]), jnp.zeros(1, int), threat_model=advmeta.ThreatModel(),
            key=KEY, samples=0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="samples=0"):
        average_logits(lambda x, key: x, KEY, 0)


def test_average_logits_is_the_mean_over_the_keys_for_every_example():
    def noisy(x, key):
        return x * jax.random.normal(key, x.shape)

    x = jnp.array([[1.0, 2.0], [1.0, 2.0], [3.0, 1.0]])
    averaged = average_logits(noisy, KEY, 4)
    draws = [jax.random.normal(key, (1, 2)) for key in jax.random.split(KEY, 4)]
    np.testing.assert_allclose(averaged(x), x * np.mean(draws, axis=0), rtol=1e-5)
