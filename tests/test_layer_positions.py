"""Which layers a tree of parameters has, and in which order they follow each other."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from advmeta.meta_optimizer import features
from advmeta.meta_optimizer.layers import LayerPosition, layer_positions


def layer(*shape):
    return {"kernel": np.zeros(shape), "bias": np.zeros(shape[-1])}


def test_layer_10_comes_after_layer_2():
    params = {f"layer_{i}": layer(i + 1, i + 2) for i in range(11)}
    positions = layer_positions(params)
    paths = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    first = {path for path, p in zip(paths, positions, strict=True) if p.first}
    last = {path for path, p in zip(paths, positions, strict=True) if p.last}
    assert (first, last) == ({"layer_0"}, {"layer_10"})  # "layer_10" < "layer_2" as text
    sizes = {path: p.fan_in for path, p in zip(paths, positions, strict=True) if not p.bias}
    assert sizes == {f"layer_{i}": i + 1 for i in range(11)}


def test_positions_of_any_tree():
    # Layers are parents of leaves; a norm without a kernel is neither the first nor the last.
    params = [{"norm": {"scale": np.zeros(3)}}, layer(3, 3, 2, 8), (layer(8, 4),)]
    norm, conv_bias, conv, dense_bias, dense = layer_positions(params)
    assert (norm.first, norm.last, norm.bias) == (False, False, True)
    assert (conv.first, conv.last, conv.bias, conv.fan_in, conv.fan_out) == (
        True, False, False, 18, 8)  # fmt: skip
    assert (conv_bias.first, conv_bias.bias, conv_bias.fan_in, conv_bias.fan_out) == (
        True, True, 1, 8)  # fmt: skip
    assert (dense.first, dense.last, dense_bias.last) == (False, True, True)


def test_what_a_model_has_is_known_of_each_tensor():
    def kinds(params):
        return {(p.convolutional, p.normalised) for p in layer_positions(params)}

    eqx_norm = eqx.nn.LayerNorm(4)
    assert kinds([layer(3, 4), layer(4, 2)]) == {(False, False)}
    assert kinds([layer(3, 3, 1, 4), layer(4, 2)]) == {(True, False)}
    assert kinds([layer(3, 4), {"scale": np.ones(4)}]) == {(False, True)}
    assert kinds([layer(3, 4), eqx_norm]) == {(False, True)}
    assert kinds([np.zeros((3, 4)), np.zeros(4)]) == {(False, False)}  # a bias, presumably


def test_positions_without_kernels_or_without_anything():
    assert layer_positions({}) == []
    (scalar,) = layer_positions(np.float32(1))
    assert scalar == LayerPosition(False, False, True, outputs=0, fan_in=1, fan_out=1)


def test_a_kernel_without_a_name_is_the_only_layer():
    kernel = np.zeros((4, 3), np.float32)
    assert layer_positions(kernel) == layer_positions([kernel])


def test_a_single_layer_is_the_first_and_the_last():
    bias, kernel = layer_positions({"layer_0": layer(4, 2)})
    assert kernel.first and kernel.last and bias.first and bias.last


def test_an_equinox_layer_is_seen_as_its_transpose():
    """Attributes of a module: weight (outputs, inputs), and a bias that may have rank 3."""

    class Layer(eqx.Module):
        weight: jax.Array
        bias: jax.Array

    eqx_kernel = np.sin(np.arange(15, dtype=np.float32)).reshape(5, 3)
    ours = {"layer": {"kernel": eqx_kernel.T, "bias": jnp.ones(5)}}
    for bias in (jnp.ones(5), jnp.ones((5, 1, 1))):
        bias_position, kernel_position = layer_positions(ours)
        same_kernel, same_bias = layer_positions({"layer": Layer(eqx_kernel, bias)})
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
    assert layer_positions(state) == layer_positions(plain)


def depths(params):
    """Of each layer's kernel, by the first name of its path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    pairs = zip(leaves, layer_positions(params), strict=True)
    return {
        jax.tree_util.keystr(path[:1], simple=True): p.depth for (path, _), p in pairs if not p.bias
    }


def test_layers_follow_each_other_by_what_they_take_where_their_names_do_not():
    # By name: body, head, stem. 8 of the head's outputs are the tail's inputs.
    chain = {"stem": layer(5, 7), "body": layer(7, 7), "middle": layer(7, 8), "a": layer(8, 2)}
    assert depths(chain) == {"stem": 0, "body": 1, "middle": 2, "a": 3}
    # Three channels at four places each.
    images = {"net": layer(3, 3, 1, 3), "head": layer(12, 5)}
    assert depths(images) == {"net": 0, "head": 1}
    # Where the names do, they decide, and where nothing does.
    assert depths({"b": layer(4, 4), "a": layer(4, 4)}) == {"a": 0, "b": 1}
    assert depths({"b": layer(3, 4), "a": layer(5, 6)}) == {"a": 0, "b": 1}
    # Too many layers to try all orders.
    many = {f"{chr(100 - i)}": layer(i + 1, i + 2) for i in range(13)}
    assert depths(many) == {name: depth for depth, name in enumerate(sorted(many))}


def test_kernels_side_by_side_are_layers_of_their_own():
    kernels = {f"w{i}": np.zeros((i + 1, i + 2)) for i in range(11)}
    biases = {f"b{i}": np.zeros(i + 2) for i in range(11)}
    assert depths(kernels) == {f"w{i}": i for i in range(11)}
    positions = dict(zip(sorted(kernels | biases), layer_positions(kernels | biases), strict=True))
    assert all(positions[f"w{i}"].depth == positions[f"b{i}"].depth == i for i in range(11))
    assert positions["b10"].last and positions["b10"].bias and positions["w0"].first
    # Whose the one bias is nobody knows.
    bias, first, last = layer_positions(
        {"b": np.zeros(2), **{f"w{i}": np.zeros((2, 2)) for i in range(2)}}
    )
    assert (bias.first, bias.last, first.first, last.last) == (False, False, True, True)


def test_attributes_are_layers_in_the_order_of_their_declaration():
    class Model(eqx.Module):
        wide: eqx.nn.Linear
        narrow: eqx.nn.Linear

    def linear():
        return eqx.nn.Linear(3, 3, key=jax.random.key(0))

    assert depths(eqx.filter(Model(linear(), linear()), eqx.is_array)) == {"wide": 0, "narrow": 1}


@pytest.mark.parametrize("names", ["dense dense2 dense10 out", "conv conv1 conv1_b conv2"])
def test_a_name_without_a_number_comes_before_the_same_with_one(names):
    params = {name: jnp.zeros((4, 4)) for name in names.split()}
    depths = dict(zip(sorted(params), (p.depth for p in layer_positions(params)), strict=True))
    assert sorted(depths, key=depths.get) == names.split()


def test_attributes_that_come_by_the_alphabet_follow_their_numbers():
    @chex.dataclass
    class Model:  # which flattens l1, l10, l2
        l1: jax.Array
        l2: jax.Array
        l10: jax.Array

    params = Model(**{name: jnp.zeros((4, 4)) for name in ("l1", "l2", "l10")})
    assert [p.depth for p in layer_positions(params)] == [0, 2, 1]


def test_scales_of_any_rank_are_no_kernels():
    # As hk.BatchNorm has them, and eqx.nn.LayerNorm((4, 3, 3)).
    haiku = {
        "batch_norm": {"scale": jnp.ones((1, 1, 1, 4)), "offset": jnp.ones((1, 1, 1, 4))},
        "conv2_d": {"w": jnp.ones((3, 3, 1, 4)), "b": jnp.ones(4)},
        "linear": {"w": jnp.ones((4, 2)), "b": jnp.ones(2)},
    }
    for params, first in ((haiku, "w"), (_equinox_with_layer_norm(), "weight")):
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        positions = layer_positions(params)
        assert all(p.normalised and p.layers == 2 for p in positions)
        kernels = [jax.tree_util.keystr(k, simple=True, separator=".")
                   for k, p in zip(paths, positions, strict=True) if not p.bias]  # fmt: skip
        assert len(kernels) == 2 and all(name.endswith(first) for name in kernels)


def _equinox_with_layer_norm():
    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.LayerNorm
        linear: eqx.nn.Linear

    key = jax.random.key(0)
    return eqx.filter(
        Net(eqx.nn.Conv2d(1, 4, 3, key=key), eqx.nn.LayerNorm((4, 3, 3)),
            eqx.nn.Linear(36, 2, key=key)),
        eqx.is_array,
    )  # fmt: skip
