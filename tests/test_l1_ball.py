"""`advmeta.attacks.l1_ball`: the projection that l1 attacks stand on, and their sparse steps."""

import jax.numpy as jnp
import numpy as np
import pytest

from advmeta.attacks import l1_ball

RNG = np.random.default_rng(0)
N, D = 24, 30
BOUNDS = (-1.0, 2.0)
X = RNG.uniform(*BOUNDS, size=(N, D)).astype(np.float32)
X[:, :8] = RNG.choice(BOUNDS, size=(N, 8))  # on the bounds, where images are
DELTA = RNG.normal(size=(N, D)).astype(np.float32)
# From far outside of the ball to inside of it.
RADIUS = np.geomspace(0.05, 60, N).astype(np.float32)


def room_of(delta, x):
    return np.where(delta > 0, BOUNDS[1] - x, x - BOUNDS[0])


def bisected(delta, x, radius):
    """The same in float64, by bisection over the amount that every coordinate is shortened by."""
    size, room = np.abs(delta), room_of(delta, x)
    low, high = 0.0, size.max()
    if np.minimum(size, room).sum() <= radius:
        high = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        inside = np.clip(size - middle, 0, room).sum() <= radius
        low, high = (low, middle) if inside else (middle, high)
    return np.sign(delta) * np.clip(size - high, 0, room)


@pytest.fixture(scope="module")
def projected():
    found = l1_ball.project(
        jnp.asarray(DELTA), jnp.asarray(X), jnp.asarray(RADIUS)[:, None], BOUNDS
    )
    return np.asarray(found, np.float64)


def test_projection_is_the_one_found_by_bisection(projected):
    rows = zip(*(v.astype(np.float64) for v in (DELTA, X, RADIUS)), strict=True)
    np.testing.assert_allclose(projected, [bisected(*row) for row in rows], atol=1e-6)


def test_projection_is_in_the_ball_and_the_bounds(projected):
    assert (np.abs(projected).sum(axis=1) <= RADIUS * (1 + 1e-6)).all()
    assert (np.abs(projected) <= room_of(DELTA, X) + 1e-7).all()


def test_projection_cannot_be_improved(projected):
    # The nearest point p of a convex set is the one with <delta - p, q - p> <= 0 for every q in it.
    # Random points of the set, dense and sparse, that use all of the ball or reach the bounds.
    for entries in (1, 3, D):
        for _ in range(50):
            q = RNG.normal(size=(N, D)) * (
                RNG.permuted(np.tile(np.arange(D), (N, 1)), axis=1) < entries
            )
            q *= (RADIUS / np.abs(q).sum(axis=1))[:, None]
            q = np.clip(X + q, *BOUNDS) - X
            assert (((DELTA - projected) * (q - projected)).sum(axis=1) <= 1e-4).all()


def test_projection_leaves_what_is_inside_and_no_ball_leaves_nothing():
    inside = DELTA[:1] * 1e-3
    x, delta = np.full((1, D), 0.5, np.float32), jnp.asarray(inside)
    np.testing.assert_array_equal(l1_ball.project(delta, x, 1.0, BOUNDS), inside)
    np.testing.assert_array_equal(l1_ball.project(delta, x, 0.0, BOUNDS), 0 * inside)


def test_sparse_signs_are_those_of_the_largest_entries():
    share = np.linspace(0, 1, N).astype(np.float32)
    found = np.asarray(l1_ball.sparse_sign(jnp.asarray(DELTA), jnp.asarray(share)))
    for i in range(N):
        kept = np.argsort(-np.abs(DELTA[i]))[: max(int(np.ceil(share[i] * D - 1e-4)), 1)]
        expected = np.zeros(D)
        expected[kept] = np.sign(DELTA[i, kept]) / len(kept)
        np.testing.assert_allclose(found[i], expected, rtol=1e-6)


def test_sparse_signs_of_ties_and_of_nothing():
    gradient = jnp.array([[2.0, -2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-30, 0.0, 0.0, 0.0]])
    expected = [[0.5, -0.5, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_array_equal(l1_ball.sparse_sign(gradient, 0.25), expected)
    # No more signs than there are entries that have one.
    np.testing.assert_array_equal(l1_ball.sparse_sign(gradient, 0.75)[2], [1, 0, 0, 0])


def test_first_float_is_the_very_float():
    limit = jnp.array([0.0, 1e-20, 0.1, 1.0, 3e38], jnp.float32)
    first = l1_ball.first_float(lambda v: v < limit, 5)
    np.testing.assert_array_equal(first, limit)
    after = l1_ball.first_float(lambda v: v <= limit, 5)
    np.testing.assert_array_equal(after[1:], np.nextafter(limit[1:], np.float32(np.inf)))
