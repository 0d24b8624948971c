import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import linear, linear_problem
from jax.tree_util import Partial

import advmeta
from advmeta.attacks import carlini_wagner

KEY = jax.random.key(0)
attack = functools.partial(carlini_wagner, key=KEY, steps=300)


@pytest.fixture(scope="module")
def problem():
    # Two classes, because the margin leads to the class of the least gap, which among several need
    # not be the nearest; and farther than two Adam steps, because closer ones are found less well.
    params, x, y, distance = linear_problem("l2", n=40, classes=2)
    far = np.flatnonzero(distance > 0.02)[:16]
    assert len(far) == 16
    return Partial(linear, params), x[far], y[far], distance[far]


def test_the_boundary_of_a_linear_model_is_found(problem):
    logits_fn, x, y, distance = problem
    epsilon = np.full(16, np.median(distance), np.float32)
    result = attack(logits_fn, x, y, threat_model=advmeta.ThreatModel("l2", epsilon))
    np.testing.assert_allclose(result.distance, distance, rtol=0.01)
    clear = np.abs(distance / epsilon - 1) > 0.01
    np.testing.assert_array_equal(result.is_adversarial[clear], (distance < epsilon)[clear])
    np.testing.assert_array_equal(
        logits_fn(result.x_adv).argmax(axis=1) != y, result.is_adversarial
    )
    # Points beyond epsilon are not handed out.
    robust = ~np.asarray(result.is_adversarial)
    np.testing.assert_array_equal(result.x_adv[robust], x[robust])


def test_the_batch_does_not_matter(problem):
    logits_fn, x, y, _ = problem
    epsilon = np.full(16, 1.0, np.float32)
    whole = attack(logits_fn, x, y, threat_model=advmeta.ThreatModel("l2", epsilon))
    order = np.random.default_rng(0).permutation(16)
    # The other half of the batch is replaced too: images that stop at other times.
    other = attack(
        logits_fn, jnp.where(order[:, None] < 8, x[order], 0.5 + 0.2 * x[order]), y[order],
        threat_model=advmeta.ThreatModel("l2", epsilon),
    )  # fmt: skip
    same = order < 8
    np.testing.assert_allclose(other.distance[same], whole.distance[order][same], rtol=1e-4)


def test_targeted_with_confidence_stops_that_far_behind_the_boundary():
    # Two classes, one value: z = (0, 8 x - 4) changes at x = 0.5 and has margin 0.8 at x = 0.6.
    logits_fn = lambda x: jnp.concatenate([0 * x, 8 * x - 4], axis=1)  # noqa: E731
    result = attack(
        logits_fn, jnp.array([[0.3]]), jnp.array([1]), targeted=True, confidence=0.8,
        threat_model=advmeta.ThreatModel("l2", 1.0, bounds=(-1.0, 3.0)),
    )  # fmt: skip
    np.testing.assert_allclose(result.distance, 0.3, rtol=0.01)
    assert result.is_adversarial.all()


def test_clean_errors_are_at_distance_zero_and_constant_models_at_infinity():
    x, y = jnp.array([[0.0, 1.0], [0.2, 0.9]]), jnp.array([0, 1])
    constant = lambda x: jnp.broadcast_to(jnp.array([1.0, 0.0]), x.shape)  # noqa: E731
    result = attack(constant, x, y, threat_model=advmeta.ThreatModel("l2", 1.0))
    np.testing.assert_array_equal(result.distance, [jnp.inf, 0.0])
    np.testing.assert_array_equal(result.x_adv, x)


def test_vmap_over_models_and_restarts(problem):
    logits_fn, x, y, distance = problem
    params = logits_fn.args[0]
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 3 * leaf]), params)

    def distances(params):
        return carlini_wagner(
            Partial(linear, params), x[:4], y[:4], key=KEY, steps=200, restarts=2,
            threat_model=advmeta.ThreatModel("l2", 0.1),
        ).distance  # fmt: skip

    found = jax.jit(jax.vmap(distances))(stacked)
    np.testing.assert_allclose(found, np.stack([distance[:4]] * 2), rtol=0.01)


def test_other_norms_are_refused():
    x, y = jnp.array([[0.6, 0.5]]), jnp.array([0])
    with pytest.raises(ValueError, match="minimises the l2 norm and the threat model has linf"):
        attack(lambda x: x, x, y, threat_model=advmeta.ThreatModel("linf"))
    with pytest.raises(ValueError, match="binary_search_steps=0"):
        attack(lambda x: x, x, y, threat_model=advmeta.ThreatModel("l2"), binary_search_steps=0)
