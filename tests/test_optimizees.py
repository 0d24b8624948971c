import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import tiny_task

from advmeta import optimizees
from advmeta.meta_optimizer import (
    Aim,
    MetaOptimizerConfig,
    init_meta_params,
    scale_by_meta_optimizer,
)
from advmeta.optimizees import layers
from advmeta.types import Optimizee
from advmeta.unroll import train

KEY = jax.random.key(0)
SHAPE = (4, 4, 1)
# Each with its number of parameters for SHAPE and 3 classes, kernel + bias for each layer:
MODELS = {
    "linear": 16 * 3 + 3,
    "mlp-5": 16 * 5 + 5 + 5 * 3 + 3,
    "mlp-5-4-tanh": 16 * 5 + 5 + 5 * 4 + 4 + 4 * 3 + 3,
    # 4 x 4 -> 2 x 2 -> 1 x 1 pixels
    "cnn-2-3-gelu": 9 * 2 + 2 + 9 * 2 * 3 + 3 + 1 * 1 * 3 * 3 + 3,
    # stem; a block is norm, conv, norm, conv, shortcut; head after the mean over pixels
    "resnet-2-3-sigmoid": (9 * 2 + 2)
    + (4 + 9 * 4 + 2 + 4 + 9 * 4 + 2 + 4 + 2)
    + (4 + 9 * 6 + 3 + 6 + 9 * 9 + 3 + 6 + 3)
    + (3 * 3 + 3),
}


@functools.cache
def model(name):
    """The optimizee, its parameters for two keys in one tree, and three images."""
    optimizee = optimizees.by_name(name, 3)
    init = jax.jit(jax.vmap(lambda key: optimizee.init(key, SHAPE)))
    x = np.random.default_rng(0).uniform(size=(3, *SHAPE)).astype(np.float32)
    return optimizee, init(jax.random.split(KEY, 2)), x


def first(tree):
    return jax.tree.map(lambda a: a[0], tree)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_sizes(name):
    optimizee, params, x = model(name)
    assert sum(p.size for p in jax.tree.leaves(first(params))) == MODELS[name]
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert jax.eval_shape(optimizee.apply, first(params), x).shape == (3, 3)
    assert set(map(type, jax.tree.leaves(params, is_leaf=lambda t: isinstance(t, dict)))) == {dict}
    batch = jax.eval_shape(lambda: optimizee.init(KEY, (9, *SHAPE)))
    assert jax.tree.map(jnp.shape, batch) == jax.tree.map(jnp.shape, first(params))


@pytest.mark.parametrize("name", MODELS)
def test_apply_is_pure(name):
    # Many models at once give what each gives, and an image's logits depend on that image alone.
    optimizee, params, x = model(name)
    together = jax.jit(jax.vmap(optimizee.apply, in_axes=(0, None)))(params, x)
    apply = jax.jit(optimizee.apply)
    for i in range(2):
        alone = apply(jax.tree.map(lambda a, i=i: a[i], params), x)
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(apply(first(params), x[::-1])[::-1], together[0], atol=1e-5)
    assert abs(together[0] - together[1]).max() > 1e-3  # the keys made different models


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_finite_and_reach_every_layer(name):
    # Also where all pixels of an image are equal, and its variance zero.
    optimizee, params, x = model(name)

    @jax.jit
    @jax.grad
    def gradient(params, x):
        return (optimizee.apply(params, x) ** 2).sum()

    for images in (x, np.zeros_like(x)):
        leaves = jax.tree.leaves(gradient(first(params), images))
        assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert all(abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient(first(params), x)))


@pytest.mark.parametrize(
    ("activation", "gain"), [("relu", 2), ("gelu", 2), ("tanh", 1), ("sigmoid", 1)]
)
def test_variance_of_fresh_kernels(activation, gain):
    # gain / fan-in. The variance of n normal numbers has a relative deviation of sqrt(2 / n).
    init = jax.jit(optimizees.mlp((60,), activation).init, static_argnums=1)
    params = init(KEY, (10, 10, 1))
    kernel = np.asarray(params["layer_0"]["kernel"])
    assert abs(kernel.var() * 100 / gain - 1) < 5 * np.sqrt(2 / kernel.size)
    readout = np.asarray(params["layer_1"]["kernel"])
    assert abs(readout.var() * 60 - 1) < 5 * np.sqrt(2 / readout.size)  # no activation after it
    assert not np.any(params["layer_0"]["bias"])


def test_fan_in_of_a_convolution_counts_its_window():
    init = jax.jit(optimizees.cnn((64, 8)).init, static_argnums=1)
    kernel = np.asarray(init(KEY, (4, 4, 1))["layer_1"]["kernel"])
    assert kernel.shape == (3, 3, 64, 8)
    assert abs(kernel.var() * 9 * 64 / 2 - 1) < 5 * np.sqrt(2 / kernel.size)


def test_an_mlp_written_out():
    optimizee, params, x = model("mlp-5")
    p = first(params)
    hidden = np.maximum(0, x.reshape(3, 16) @ p["layer_0"]["kernel"] + p["layer_0"]["bias"])
    expected = hidden @ p["layer_1"]["kernel"] + p["layer_1"]["bias"]
    np.testing.assert_allclose(optimizee.apply(p, x), expected, rtol=1e-4, atol=1e-5)


def test_by_name_gives_one_object_a_name():
    assert optimizees.by_name("mlp-20", 10) is optimizees.by_name("mlp-20", 10)
    assert optimizees.by_name("mlp-20", 10) is not optimizees.by_name("mlp-20", 3)


@pytest.mark.parametrize("name", ["vgg", "mlp", "mlp-0", "mlp-20-softplus", "cnn-tanh", "MLP-20"])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=f"'{name}' is unknown.*'linear'.*'mlp', 'cnn'.*'resnet'"):
        optimizees.by_name(name)


def test_unknown_activation_lists_the_known_ones():
    for make in (optimizees.mlp, optimizees.cnn, optimizees.resnet):
        with pytest.raises(ValueError, match=r"'swish' is unknown.*relu.*tanh.*gelu.*sigmoid"):
            make(activation="swish")


@pytest.mark.parametrize("make", [
    lambda: optimizees.mlp((20, 0)), lambda: optimizees.cnn((2.5,)),
    lambda: optimizees.resnet((-1,)), lambda: optimizees.linear(0),
])  # fmt: skip
def test_sizes_must_be_positive(make):
    with pytest.raises(ValueError, match="must hold whole numbers of at least 1"):
        make()


# Anyone's model.


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(3)(x)


def flax_model():
    net = Net()
    return Optimizee(lambda key, x_shape: net.init(key, jnp.zeros((1, *x_shape))), net.apply)


def equinox_model():
    eqx = pytest.importorskip("equinox")

    def build(key):
        return eqx.nn.MLP(in_size=4, out_size=3, width_size=8, depth=1, key=key)

    rest = eqx.filter(build(KEY), eqx.is_inexact_array, inverse=True)

    def init(key, x_shape):
        return eqx.filter(build(key), eqx.is_inexact_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, rest))(x.reshape(x.shape[0], -1))

    return Optimizee(init, apply)


def plain_functions():
    def init(key, x_shape):
        return [0.5 * jax.random.normal(key, (4, 8)), jnp.zeros((8, 3))]

    def apply(params, x):
        return jnp.tanh(x.reshape(x.shape[0], -1) @ params[0]) @ params[1]

    return Optimizee(init, apply)


@pytest.mark.parametrize("make", [flax_model, equinox_model, plain_functions])
def test_the_meta_optimizer_trains_any_model(make):
    # 3 classes: at chance the loss is log 3 = 1.1.
    task = tiny_task(make(), batch_size=16)
    config, aim = MetaOptimizerConfig(hidden=(2,), learning_rate=0.03), Aim(horizon=150)
    meta_params = jax.jit(functools.partial(init_meta_params, config))(KEY)

    @jax.jit
    def run(key):
        return train(task, scale_by_meta_optimizer(meta_params, config, aim), key, steps=150)

    params, trajectory = run(jax.random.key(1))
    assert trajectory.loss[-10:].mean() < 0.5 * trajectory.loss[0]
    accuracy = (task.optimizee.apply(params, task.train.x).argmax(axis=1) == task.train.y).mean()
    assert accuracy >= 0.8


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize("window", [1, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_is_that_of_xla(size, window, stride):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "kernel": jax.random.normal(keys[0], (window, window, 3, 4)),
        "bias": jax.random.normal(keys[1], (4,)),
    }
    x = jax.random.normal(keys[2], (2, *size, 3))
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        x, params["kernel"], (stride, stride), "SAME", dimension_numbers=layout
    )
    np.testing.assert_allclose(
        layers.conv(params, x, stride), expected + params["bias"], rtol=1e-5, atol=1e-5
    )
