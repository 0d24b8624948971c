"""The Jacobian of a model without its activations, against that of real models."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.tiny import compile_fast as compile_fast

from advmeta import optimizees
from advmeta.meta_optimizer.jacobian import SOFTNESS, gain, gain_and_pull
from advmeta.meta_optimizer.layers import layer_positions

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def kernels_of(params):
    """As the optimizer takes them: kernels in the order of their layers, with their positions."""
    leaves, positions = jax.tree.leaves(params), layer_positions(params)
    layers = [pair for pair in zip(leaves, positions, strict=True) if not pair[1].bias]
    layers.sort(key=lambda pair: pair[1].depth)
    return [list(column) for column in zip(*layers, strict=True)]


def test_gain_of_two_matrices():
    # J = W_1 W_2 = [[1, -1], [6, 2]]; less the mean over the classes [[1, -1], [2, -2]].
    # l2: two columns of the length sqrt(1 + 4). linf: s log(e^{j/s} + e^{-j/s}) of each entry, with
    # s = 0.16 sqrt(10 / 4), is |j| to 1e-3.
    kernels = [jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, -1.0], [3.0, 1.0]])]
    positions = layer_positions(kernels)
    assert gain(kernels, positions, "l2") == pytest.approx(5**0.5, rel=1e-6)
    soft = SOFTNESS * np.sqrt(10 / 4)
    expected = sum(soft * np.logaddexp(j / soft, -j / soft) for j in (1, -1, 2, -2)) / 2
    assert gain(kernels, positions) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize(
    ("optimizee", "image"),
    [
        (optimizees.linear(4), (2, 3, 1)),
        (optimizees.mlp((5, 6), "tanh", 4), (2, 3, 1)),
        # Windows of 3 x 3 pixels overlap, and the last ones reach over the edge of the image.
        (optimizees.cnn((3,), "tanh", 4), (6, 6, 2)),
        (optimizees.cnn((3, 5), "tanh", 4), (8, 8, 2)),
    ],
)
def test_gain_is_that_of_the_model_where_its_activations_are_linear(optimizee, image):
    # At x = 0, without biases, tanh has the slope 1: the Jacobian of the whole model there is that
    # of its kernels.
    params = optimizee.init(jax.random.key(0), image)
    jacobian = jax.jacobian(lambda x: optimizee.apply(params, x[None])[0])(jnp.zeros(image))
    jacobian = (jacobian - jacobian.mean(axis=0)).reshape(4, -1)
    expected = jnp.linalg.norm(jacobian, axis=1).mean()
    assert gain(*kernels_of(params), "l2") == pytest.approx(float(expected), rel=1e-4)


def test_places_of_an_image_that_is_no_square_lie_side_by_side():
    params = optimizees.cnn((3,), "tanh", 4).init(jax.random.key(0), (4, 2, 1))
    kernels, positions = kernels_of(params)
    window, dense = kernels[0].reshape(9, 3), kernels[1].reshape(2, 3, 4)
    jacobian = jnp.einsum("io,poe->ipe", window, dense - dense.mean(axis=2, keepdims=True))
    expected = jnp.linalg.norm(jacobian.swapaxes(0, 1).reshape(-1, 4), axis=0).mean()
    assert gain(kernels, positions, "l2") == pytest.approx(float(expected), rel=1e-4)


def test_places_are_one_where_j_would_have_too_many_entries(monkeypatch):
    params = optimizees.cnn((3,), "tanh", 4).init(jax.random.key(0), (4, 4, 1))
    kernels, positions = kernels_of(params)
    monkeypatch.setattr("advmeta.meta_optimizer.jacobian.MOST_ENTRIES", 9 * 4 * 4 - 1)
    apart = np.asarray(kernels[1]).reshape(4, 3, 4)
    apart = apart - apart.mean(axis=2, keepdims=True)
    mean = apart.mean(axis=0)
    # Four independent places add to twice the norm of one, and their mean to half of it.
    several = 2 * np.sqrt(np.square(apart).mean() / np.square(mean).mean())
    expected = several * np.linalg.norm(kernels[0].reshape(9, 3) @ mean, axis=0).mean()
    assert gain(kernels, positions, "l2") == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_gain_of_a_mean_place_is_about_that_of_all(monkeypatch, norm):
    # What is left is that windows overlap: each pixel is under two windows or so.
    params = optimizees.cnn((8, 16)).init(jax.random.key(0), (16, 16, 3))
    whole = float(gain(*kernels_of(params), norm))
    monkeypatch.setattr("advmeta.meta_optimizer.jacobian.MOST_ENTRIES", 1)
    assert 0.5 * whole < float(gain(*kernels_of(params), norm)) < 3 * whole


def test_windows_of_an_even_patch_lie_side_by_side():
    # Stride = window: each pixel is seen from one place.
    convolution, dense = normal(2, 2, 1, 3), normal(2 * 2 * 3, 4)

    def model(x):  # [4, 4, 1]
        patches = x.reshape(2, 2, 2, 2, 1).swapaxes(1, 2)
        z = jnp.einsum("hwijc,ijco->hwo", patches, convolution)
        return z.reshape(-1) @ dense

    jacobian = jax.jacobian(model)(jnp.zeros((4, 4, 1)))
    jacobian = jacobian - jacobian.mean(axis=0)
    kernels = [convolution, dense]
    found = gain(kernels, layer_positions(kernels))
    assert found == pytest.approx(float(jnp.abs(jacobian).sum()) / 4, rel=0.02)  # softened


def test_a_window_of_one_pixel_is_a_matrix_at_each_place():
    window, mixing, dense = normal(3, 3, 2, 3), normal(3, 5), normal(4 * 5, 4)
    apart, merged = [window, mixing[None, None], dense], [window @ mixing, dense]
    found = (gain(kernels, layer_positions(kernels)) for kernels in (apart, merged))
    assert next(found) == pytest.approx(float(next(found)), rel=1e-4)


def test_large_windows_lie_side_by_side():
    window, dense = normal(8, 8, 2, 3), normal(4 * 3, 4)
    centred = (dense - dense.mean(axis=1, keepdims=True)).reshape(4, 3, 4)
    jacobian = np.einsum("xo,poe->xpe", window.reshape(-1, 3), centred)
    found = gain([window, dense], layer_positions([window, dense]))
    assert found == pytest.approx(float(np.abs(jacobian).sum()) / 4, rel=0.02)  # softened


def test_layers_that_do_not_follow_each_other_are_chains_of_their_own():
    kernels = [normal(3, 5), normal(7, 2)]  # 7 inputs cannot be 5 outputs
    positions = layer_positions(kernels)
    centred = kernels[1] - kernels[1].mean(axis=1, keepdims=True)
    expected = sum(np.linalg.norm(m, axis=0).sum() for m in (kernels[0], centred)) / 7
    assert gain(kernels, positions, "l2") == pytest.approx(expected, rel=1e-5)
    assert gain([], []) == 0


def test_a_model_of_one_logit_is_pulled():
    kernels = [normal(3, 2), normal(2, 1)]
    expected = np.linalg.norm(kernels[0] @ kernels[1])
    assert gain(kernels, layer_positions(kernels), "l2") == pytest.approx(expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_step_against_the_pull_lowers_the_gain(norm):
    params = optimizees.cnn((3, 4), num_classes=5).init(jax.random.key(1), (8, 8, 2))
    kernels, positions = kernels_of(params)
    _, directions = gain_and_pull(kernels, positions, norm)
    for direction in directions:
        assert jnp.sqrt(jnp.square(direction).mean()) == pytest.approx(1, rel=1e-4)
    moved = [k - 1e-3 * d for k, d in zip(kernels, directions, strict=True)]
    assert gain(moved, positions, norm) < gain(kernels, positions, norm)


def test_the_pull_of_zeros_is_zero():
    kernels = [jnp.zeros((3, 2)), jnp.zeros((2, 4))]
    for direction in gain_and_pull(kernels, layer_positions(kernels))[1]:
        np.testing.assert_array_equal(direction, np.zeros_like(direction))


def test_entries_that_stand_out_by_far_stay_finite():
    # e^{j / s} of the largest is beyond float32: s is 0.16 of an RMS that is a 300th of it.
    kernel = jnp.zeros((300, 300)).at[0, 0].set(1.0)
    _, (direction,) = gain_and_pull([kernel], layer_positions([kernel]))
    assert np.isfinite(direction).all()


def test_an_equinox_layer_is_pulled_as_its_transpose():
    class Layer(eqx.Module):
        weight: jax.Array

    kernels = normal(6, 3), normal(3 * 2, 4)  # the second sees two places of each of 3 outputs
    # In (outputs, inputs) the places of an output are next to each other.
    second = kernels[1].reshape(2, 3, 4).swapaxes(0, 1).reshape(6, 4)
    theirs = [Layer(kernels[0].T), Layer(second.T)]
    _, ours = gain_and_pull(list(kernels), layer_positions(list(kernels)))
    _, found = gain_and_pull([layer.weight for layer in theirs], layer_positions(theirs))
    np.testing.assert_allclose(found[0].T, ours[0], rtol=1e-4, atol=1e-5)
    second_pull = found[1].T.reshape(3, 2, 4).swapaxes(0, 1).reshape(6, 4)
    np.testing.assert_allclose(second_pull, ours[1], rtol=1e-4, atol=1e-5)


def test_a_pytorch_like_convolution_is_pulled_as_its_transpose():
    class Layer(eqx.Module):
        weight: jax.Array  # (outputs, inputs, ...)

    params = optimizees.cnn((3, 4), num_classes=5).init(jax.random.key(1), (8, 8, 2))
    kernels, positions = kernels_of(params)
    theirs = [Layer(k.transpose(3, 2, 0, 1)) for k in kernels[:2]]
    # Its features are flattened with the places of a channel next to each other.
    theirs.append(Layer(kernels[2].reshape(4, 4, 5).transpose(2, 1, 0).reshape(5, 16)))
    _, found = gain_and_pull([layer.weight for layer in theirs], layer_positions(theirs))
    _, expected = gain_and_pull(kernels, positions)
    for direction, other in zip(expected[:2], found[:2], strict=True):
        np.testing.assert_allclose(other.transpose(2, 3, 1, 0), direction, rtol=1e-3, atol=1e-4)
    last = found[2].reshape(5, 4, 4).transpose(2, 1, 0).reshape(16, 5)
    np.testing.assert_allclose(last, expected[2], rtol=1e-3, atol=1e-4)
