import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.tiny import compile_fast as compile_fast
from flax import nnx

from advmeta.meta_optimizer import features


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
    position = features.LayerPosition(True, False, False, outputs=1, fan_in=2, fan_out=2, layers=5,
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
    (position,) = features.layer_positions([parameter])
    own = features.parameter_features(parameter), features.log_sign(parameter)
    for feature in (*own, *features.layer_features(parameter, parameter, position)):
        assert len(feature.shape) == 1 + len(shape)
        assert np.broadcast_shapes(feature.shape[1:], shape) == shape
        assert np.isfinite(feature).all()


def test_scale_of_a_tensor_shows_in_its_rms_alone():
    kernel = jnp.array([[0.5, -1.0, 2.0], [3.0, 1.0, -0.1]])
    (position,) = features.layer_positions([kernel])
    small, large = (features.layer_features(c * kernel, kernel, position) for c in (1.0, 1000.0))
    expected = np.array(small[0])
    expected[8] += np.log(1000) / 10
    np.testing.assert_allclose(large[0], expected, rtol=1e-4)
    for a, b in zip(small[1:], large[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(
        features.parameter_features(kernel), features.parameter_features(1000 * kernel), rtol=1e-5
    )


def layer(*shape):
    return {"kernel": np.zeros(shape), "bias": np.zeros(shape[-1])}


def test_layer_10_comes_after_layer_2():
    params = {f"layer_{i}": layer(i + 1, i + 2) for i in range(11)}
    positions = features.layer_positions(params)
    paths = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    first = {path for path, p in zip(paths, positions, strict=True) if p.first}
    last = {path for path, p in zip(paths, positions, strict=True) if p.last}
    assert (first, last) == ({"layer_0"}, {"layer_10"})  # "layer_10" < "layer_2" as text
    sizes = {path: p.fan_in for path, p in zip(paths, positions, strict=True) if not p.bias}
    assert sizes == {f"layer_{i}": i + 1 for i in range(11)}


def test_positions_of_any_tree():
    # Layers are parents of leaves; a norm without a kernel is neither the first nor the last.
    params = [{"norm": {"scale": np.zeros(3)}}, layer(3, 3, 2, 8), (layer(8, 4),)]
    norm, conv_bias, conv, dense_bias, dense = features.layer_positions(params)
    assert (norm.first, norm.last, norm.bias) == (False, False, True)
    assert (conv.first, conv.last, conv.bias, conv.fan_in, conv.fan_out) == (
        True, False, False, 18, 8)  # fmt: skip
    assert (conv_bias.first, conv_bias.bias, conv_bias.fan_in, conv_bias.fan_out) == (
        True, True, 1, 8)  # fmt: skip
    assert (dense.first, dense.last, dense_bias.last) == (False, True, True)


def test_what_a_model_has_is_known_of_each_tensor():
    def kinds(params):
        return {(p.convolutional, p.normalised) for p in features.layer_positions(params)}

    eqx_norm = eqx.nn.LayerNorm(4)
    assert kinds([layer(3, 4), layer(4, 2)]) == {(False, False)}
    assert kinds([layer(3, 3, 1, 4), layer(4, 2)]) == {(True, False)}
    assert kinds([layer(3, 4), {"scale": np.ones(4)}]) == {(False, True)}
    assert kinds([layer(3, 4), eqx_norm]) == {(False, True)}
    assert kinds([np.zeros((3, 4)), np.zeros(4)]) == {(False, False)}  # a bias, presumably


@pytest.mark.parametrize(
    ("horizon", "steps"), [(None, 40), (0, 40), (1000, 40), (100, 20), (25, 5), (2, 1)]
)
def test_warm_up_takes_40_steps_or_a_fifth_of_the_horizon(horizon, steps):
    shares = [float(features.warm_up(jnp.int32(t), horizon)) for t in range(steps + 1)]
    np.testing.assert_allclose(shares, [*(np.arange(1, steps + 1) / steps), 1], rtol=1e-6)


def test_positions_without_kernels_or_without_anything():
    assert features.layer_positions({}) == []
    (scalar,) = features.layer_positions(np.float32(1))
    assert scalar == features.LayerPosition(False, False, True, outputs=0, fan_in=1, fan_out=1)


def test_a_kernel_without_a_name_is_the_only_layer():
    kernel = np.zeros((4, 3), np.float32)
    assert features.layer_positions(kernel) == features.layer_positions([kernel])


def test_a_single_layer_is_the_first_and_the_last():
    bias, kernel = features.layer_positions({"layer_0": layer(4, 2)})
    assert kernel.first and kernel.last and bias.first and bias.last


def test_an_equinox_layer_is_seen_as_its_transpose():
    """Attributes of a module: weight (outputs, inputs), and a bias that may have rank 3."""

    class Layer(eqx.Module):
        weight: jax.Array
        bias: jax.Array

    eqx_kernel = np.sin(np.arange(15, dtype=np.float32)).reshape(5, 3)
    ours = {"layer": {"kernel": eqx_kernel.T, "bias": jnp.ones(5)}}
    for bias in (jnp.ones(5), jnp.ones((5, 1, 1))):
        bias_position, kernel_position = features.layer_positions(ours)
        same_kernel, same_bias = features.layer_positions({"layer": Layer(eqx_kernel, bias)})
        assert same_kernel == kernel_position._replace(outputs=0)
        assert same_bias == bias_position
    tensor, row, column = features.layer_features(eqx_kernel.T, eqx_kernel.T, kernel_position)
    same_tensor, same_row, same_column = features.layer_features(
        eqx_kernel, eqx_kernel, same_kernel
    )
    np.testing.assert_allclose(same_tensor, tensor)
    np.testing.assert_allclose(same_row[0], row[0].T)
    np.testing.assert_allclose(same_column[0], column[0].T)


def test_the_box_of_an_nnx_variable_is_no_layer():
    _, state = nnx.split(nnx.Linear(3, 5, rngs=nnx.Rngs(0)))
    plain = {"bias": jnp.ones(5), "kernel": jnp.ones((3, 5))}
    assert features.layer_positions(state) == features.layer_positions(plain)


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
