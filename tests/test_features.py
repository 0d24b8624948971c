import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.tiny import compile_fast as compile_fast

from advmeta.meta_optimizer import features
from advmeta.meta_optimizer.layers import LayerPosition, layer_positions


def test_log_sign_is_the_equation_of_andrychowicz():
    # p = 10: large gradients give (log|g| / 10, sign g), those below e^-10 give (-1, e^10 g).
    gradients = jnp.array([np.exp(-3), -np.exp(2), 1e-6, -2e-6, 0.0], jnp.float32)
    small = np.exp(10) * 1e-6
    expected = [(-0.3, 1), (0.2, -1), (-1, small), (-1, -2 * small), (-1, 0)]
    np.testing.assert_allclose(features.log_sign(gradients).T, expected, rtol=1e-5)


def test_log_sign_is_continuous_where_its_branches_meet():
    # |g| = e^-p: log|g| / p = -1 and e^p g = +-1 on both sides.
    edge = np.exp(-10) * np.array([1 - 1e-5, 1 + 1e-5, -1 + 1e-5, -1 - 1e-5])
    found = features.log_sign(jnp.asarray(edge, jnp.float32))
    np.testing.assert_allclose(found.T, [(-1, 1), (-1, 1), (-1, -1), (-1, -1)], atol=1e-4)


def test_root_mean_square():
    # sqrt((9 + 16) / 2 + 1e-6); of zeros sqrt(1e-6).
    assert features.root_mean_square(jnp.array([3.0, -4.0])) == pytest.approx(12.5**0.5, rel=1e-6)
    assert features.root_mean_square(jnp.zeros((2, 2))) == pytest.approx(1e-3, rel=1e-6)


def test_layer_features_of_a_kernel():
    # mean square = (1 + 1 + 9 + 9) / 4 = 5; |w| / RMS has row means 1 / s, 3 / s and column means
    # 2 / s, with s = sqrt(5).
    kernel = jnp.array([[1.0, -1.0], [3.0, 3.0]])
    position = LayerPosition(True, False, False, outputs=1, fan_in=2, fan_out=2, layers=5,
                                      convolutional=True)  # fmt: skip
    tensor, row, column = features.layer_features(kernel, 7 * jnp.ones((2, 2)), position)
    log2, s = np.log(2) / 10, np.sqrt(5)
    expected = [1, 0, 0, log2, log2, np.log(5) / 3, 1, 0, np.log(s) / 10, np.log(7) / 10]
    np.testing.assert_allclose(tensor, np.reshape(expected, (10, 1, 1)), atol=1e-6)
    np.testing.assert_allclose(row, np.array([[[1 / s], [3 / s]]]), rtol=1e-5)
    np.testing.assert_allclose(column, np.array([[[2 / s, 2 / s]]]), rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 2, 3, 4)])
def test_features_broadcast_to_tensors_of_any_rank(shape):
    parameter = jnp.ones(shape)
    (position,) = layer_positions([parameter])
    own = features.parameter_features(parameter), features.log_sign(parameter)
    for feature in (*own, *features.layer_features(parameter, parameter, position)):
        assert len(feature.shape) == 1 + len(shape)
        assert np.broadcast_shapes(feature.shape[1:], shape) == shape
        assert np.isfinite(feature).all()


def test_scale_of_a_tensor_shows_in_its_rms_alone():
    kernel = jnp.array([[0.5, -1.0, 2.0], [3.0, 1.0, -0.1]])
    (position,) = layer_positions([kernel])
    small, large = (features.layer_features(c * kernel, kernel, position) for c in (1.0, 1000.0))
    expected = np.array(small[0])
    expected[8] += np.log(1000) / 10
    np.testing.assert_allclose(large[0], expected, rtol=1e-4)
    for a, b in zip(small[1:], large[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(
        features.parameter_features(kernel), features.parameter_features(1000 * kernel), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("horizon", "steps"), [(None, 40), (0, 40), (1000, 40), (100, 20), (25, 5), (2, 1)]
)
def test_warm_up_takes_40_steps_or_a_fifth_of_the_horizon(horizon, steps):
    shares = [float(features.warm_up(jnp.int32(t), horizon)) for t in range(steps + 1)]
    np.testing.assert_allclose(shares, [*(np.arange(1, steps + 1) / steps), 1], rtol=1e-6)


def test_the_aim():
    # log(0.05 / 0.1 + 0.001) in linf; l2 has 1.0 in the place of 0.1.
    linf, l2 = (features.aim_features(features.Aim(e, n)) for e, n in ((0.05, "linf"), (1.0, "l2")))
    np.testing.assert_allclose(linf, [0, np.log(0.501)], rtol=1e-5)
    np.testing.assert_allclose(l2, [1, np.log(1.001)], rtol=1e-3)
    assert np.isfinite(features.aim_features(features.Aim(0.0))).all()
    with pytest.raises(ValueError, match="norm='l1': meta-optimizers that see the aim know"):
        features.aim_features(features.Aim(1.0, "l1"))


def test_time():
    # log(1 + 49) / 10, and 150 of 200 steps left; past the horizon, none.
    known = features.Aim(horizon=200)
    np.testing.assert_allclose(features.time_features(known, 50), [np.log(51) / 10, 1, 0.75])
    np.testing.assert_allclose(features.time_features(known, 300)[1:], [1, 0])
    for unknown in (features.Aim(), features.Aim(horizon=jnp.int32(0))):
        found = features.time_features(unknown, 50)
        np.testing.assert_allclose(found, [np.log(51) / 10, 0, 0], rtol=1e-6)
