import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.tiny import compile_fast as compile_fast

import advmeta
from advmeta.attacks.threat_model import example_keys

KEY = jax.random.key(0)
NORMS = ["linf", "l2", "l1"]
RNG = np.random.default_rng(0)
X = RNG.uniform(size=(6, 3, 2, 1)).astype(np.float32)
FAR = (X + RNG.normal(size=X.shape)).astype(np.float32)


def test_projection_onto_the_cube():
    # From 0.5: offsets 0.3, -0.05 and -0.9 are cut to 0.1, -0.05 and -0.1; from 0.95 the bound.
    threat_model = advmeta.ThreatModel("linf", 0.1)
    x = jnp.array([[0.5, 0.5, 0.5, 0.95]])
    found = threat_model.project(jnp.array([[0.8, 0.45, -0.4, 2.0]]), x)
    np.testing.assert_allclose(found, [[0.6, 0.45, 0.4, 1.0]], atol=1e-7)


def test_projection_onto_the_ball():
    # The offset (3, 4) has length 5 and is scaled to 0.2: (0.12, 0.16). (0.06, 0.08) is inside.
    threat_model = advmeta.ThreatModel("l2", 0.2)
    x = jnp.full((2, 2), 0.5)
    found = threat_model.project(x + jnp.array([[3.0, 4.0], [0.06, 0.08]]), x)
    np.testing.assert_allclose(found, [[0.62, 0.66], [0.56, 0.58]], atol=1e-6)


def test_bounds_are_those_given():
    threat_model = advmeta.ThreatModel("linf", 5.0, bounds=(-1.0, 3.0))
    found = threat_model.project(jnp.array([[-4.0, 4.0]]), jnp.array([[0.0, 0.0]]))
    np.testing.assert_array_equal(found, [[-1.0, 3.0]])


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_inside_and_stays(norm):
    threat_model = advmeta.ThreatModel(norm, 0.3)
    once = threat_model.project(FAR, X)
    assert (threat_model.distance(X, once) <= 0.3 * (1 + 1e-6)).all()
    assert once.min() >= 0 and once.max() <= 1
    np.testing.assert_allclose(threat_model.project(once, X), once, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_an_epsilon_an_example_is_a_loop_of_scalars(norm):
    epsilon = np.linspace(0.0, 0.5, 6).astype(np.float32)
    together = advmeta.ThreatModel(norm, epsilon).project(FAR, X)
    for i in range(6):
        alone = advmeta.ThreatModel(norm, epsilon[i]).project(FAR[i : i + 1], X[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], atol=1e-7)
    np.testing.assert_array_equal(together[0], X[0])  # epsilon 0


def test_distance():
    # |(3, -4)|: the largest is 4, the length 5, the sum 7.
    x, moved = jnp.zeros((1, 2)), jnp.array([[3.0, -4.0]])
    assert advmeta.ThreatModel("linf").distance(x, moved).tolist() == [4.0]
    assert advmeta.ThreatModel("l2").distance(x, moved).tolist() == [5.0]
    assert advmeta.ThreatModel("l1").distance(x, moved).tolist() == [7.0]


def test_the_largest_distance_is_that_of_opposite_corners():
    # From (-1, ..., -1) to (1, ..., 1) in 9 dimensions: 2, 2 sqrt(9) and 2 * 9.
    for norm, expected in (("linf", 2.0), ("l2", 6.0), ("l1", 18.0)):
        assert advmeta.ThreatModel(norm, bounds=(-1.0, 1.0)).widest(9) == expected


def test_steepest_direction():
    # The vector of unit norm that has the largest product with (3, -4, 0): its sign (product 7, its
    # l1 norm) and itself over its length (product 5). No gradient, no direction, and no NaN.
    gradient = jnp.array([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0]])
    linf = advmeta.ThreatModel("linf").steepest(gradient)
    l2 = advmeta.ThreatModel("l2").steepest(gradient)
    np.testing.assert_array_equal(linf, [[1, -1, 0], [0, 0, 0]])
    np.testing.assert_allclose(l2, [[0.6, -0.8, 0], [0, 0, 0]], atol=1e-7)
    # Of l1 norm 1, all of it goes to the largest entry (product 4) ...
    l1 = advmeta.ThreatModel("l1").steepest
    np.testing.assert_array_equal(l1(gradient), [[0, -1, 0], [0, 0, 0]])
    # ... of up to 20 entries, and then to a twentieth of them.
    np.testing.assert_array_equal(l1(jnp.arange(40.0)[None] - 18.5)[0, -3:], [0, 0.5, 0.5])


@pytest.mark.parametrize(("norm", "mean"), [("linf", 2 / 3), ("l2", 2 / 3), ("l1", 2 / 3)])
def test_random_starts_are_uniform_in_the_ball(norm, mean):
    # In 2 dimensions the norm of a uniform point has P(norm <= r) = (r / epsilon)^2 for every norm,
    # so a mean of 2/3 epsilon and a variance of epsilon^2 / 18. 2,000 of them.
    x = jnp.full((2000, 2), 0.5) + jnp.arange(2000)[:, None] * 1e-6
    threat_model = advmeta.ThreatModel(norm, 0.25)
    start = threat_model.random_start(example_keys(KEY, x), x)
    radius = np.asarray(threat_model.distance(x, start)) / 0.25
    assert radius.max() <= 1 + 1e-5
    assert abs(radius.mean() - mean) < 5 * np.sqrt(1 / 18 / 2000)
    assert abs(np.asarray(start - x).mean(axis=0)).max() < 5 * 0.25 / np.sqrt(2000)


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_in_bounds(norm):
    x = jnp.zeros((8, 4))
    threat_model = advmeta.ThreatModel(norm, 0.25)
    start = threat_model.random_start(jax.random.split(KEY, 8), x)
    assert start.min() == 0 and start.max() > 0


def test_keys_of_examples_do_not_depend_on_the_batch():
    def bits(x):
        return np.asarray(jax.random.key_data(example_keys(KEY, x)))

    together, order = bits(X), np.array([4, 0, 5, 2, 1, 3])
    np.testing.assert_array_equal(bits(X[order]), together[order])
    np.testing.assert_array_equal(bits(X[2:3]), together[2:3])
    assert len({tuple(row) for row in together}) == 6
    other = np.asarray(jax.random.key_data(example_keys(jax.random.key(1), X)))
    assert not (other == together).all(axis=1).any()


def test_keys_see_where_a_pixel_is():
    x = jnp.array([[0.25, 0.5], [0.5, 0.25]])
    keys = jax.random.key_data(example_keys(KEY, x))
    assert (keys[0] != keys[1]).any()


def test_epsilon_is_traced_and_norm_is_static():
    threat_model = advmeta.ThreatModel("l2", 0.5, bounds=(-1.0, 1.0))
    assert jax.tree.leaves(threat_model) == [0.5]
    project = jax.jit(lambda t, a, x: t.project(a, x))
    for epsilon in (0.1, 0.2):
        moved = project(advmeta.ThreatModel("linf", epsilon), jnp.ones((1, 2)), jnp.zeros((1, 2)))
        np.testing.assert_allclose(moved, [[epsilon, epsilon]], rtol=1e-6)
    assert project._cache_size() == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"norm": "l0"}, r"norm='l0' is unknown; the known norms are \['linf', 'l2', 'l1'\]"),
        ({"epsilon": -0.1}, "epsilon=-0.1 must be finite and at least 0"),
        ({"epsilon": float("nan")}, "epsilon=nan must be finite"),
        ({"epsilon": float("inf")}, "epsilon=inf must be finite"),
        ({"epsilon": np.array([0.1, -0.1])}, "must be finite and at least 0"),
        ({"epsilon": jnp.array([0.1, -0.1])}, "must be finite and at least 0"),
        ({"bounds": (1.0, 0.0)}, r"bounds=\(1.0, 0.0\): the lower bound must be below"),
        ({"bounds": (0.5, 0.5)}, "the lower bound must be below"),
    ],
)
def test_bad_threat_model(kwargs, message):
    with pytest.raises(ValueError, match=message):
        advmeta.ThreatModel(**kwargs)
