import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.tiny import compile_fast as compile_fast
from scipy.optimize import minimize_scalar

from advmeta.held_out import calibrated, cross_entropy

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 40).astype(np.int32)
LOGITS = (RNG.normal(size=(40, 4)) + 1.5 * np.eye(4)[LABELS]).astype(np.float32)


def best(logits):
    """The lowest mean cross-entropy over all temperatures."""

    def at(b):
        z = np.exp(b) * np.asarray(logits, np.float64)
        return np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(40), LABELS])

    return minimize_scalar(at, bounds=(-4, 4), method="bounded").fun


def test_calibrated_is_the_cross_entropy_at_the_best_temperature():
    found = jax.jit(calibrated)(LOGITS, LABELS)
    assert found.shape == (40,)
    assert float(found.mean()) == pytest.approx(best(LOGITS), rel=1e-4)
    assert float(found.mean()) < float(cross_entropy(LOGITS, LABELS).mean()) - 1e-3


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1e3])
def test_calibrated_does_not_depend_on_the_scale_of_the_logits(scale):
    found = calibrated(scale * LOGITS, LABELS)
    np.testing.assert_allclose(found, calibrated(LOGITS, LABELS), rtol=1e-4)


def test_its_gradient_is_that_of_the_best_cross_entropy():
    gradient = jax.jit(jax.grad(lambda z: calibrated(z, LABELS).mean()))(LOGITS)
    # It does not change along the logits themselves, which changes their scale alone.
    assert abs(float((gradient * LOGITS).sum())) < 1e-3 * float(jnp.abs(gradient * LOGITS).sum())
    direction = RNG.normal(size=LOGITS.shape)
    expected = (best(LOGITS + 1e-3 * direction) - best(LOGITS - 1e-3 * direction)) / 2e-3
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("right", [0.0, -10.0, 5.0])
def test_calibrated_is_finite_where_no_temperature_is_best(right):
    """All logits zero; all predictions wrong, so that the flattest is best; all of them right."""
    logits = jnp.float32(right * np.eye(4)[LABELS])
    loss, gradient = jax.value_and_grad(lambda z: calibrated(z, LABELS).mean())(logits)
    assert np.isfinite(gradient).all()
    assert 0 <= float(loss) <= 1.1 * np.log(4)
