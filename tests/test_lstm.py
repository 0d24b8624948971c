import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from fixtures.tiny import compile_fast as compile_fast

from advmeta.meta_optimizer.lstm import LSTM, Affine, Linear, Memory, affine, flatten

RNG = np.random.default_rng(0)


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def random_params(lstm, *args):
    shapes = jax.eval_shape(lambda: lstm.init(jax.random.key(0), *args))
    return jax.tree.map(lambda x: normal(*x.shape), shapes)


def test_equations_written_out():
    # The equations of the docstring in numpy: two layers, and features that a row shares.
    lstm = LSTM((3, 2), outputs=2)
    own, shared = normal(2, 5, 4), normal(3, 5, 1)
    memory = tuple(Memory(normal(n, 5, 4), normal(n, 5, 4)) for n in (3, 2))
    variables = random_params(lstm, own, (shared,), memory)
    readout, updated = jax.jit(lstm.apply)(variables, own, (shared,), memory)

    p = variables["params"]
    last = functools.partial(np.moveaxis, source=0, destination=-1)
    x, of_rows = last(own), last(shared) @ p["shared_0"]["kernel"]
    for index, (h, c) in enumerate(memory):
        dense = p[f"own_{index}"]
        gates = np.concatenate([x, last(h)], axis=-1) @ dense["kernel"] + of_rows + dense["bias"]
        i, f, g, o = np.split(gates, 4, axis=-1)
        c = sigmoid(f + 1) * last(c) + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        np.testing.assert_allclose(last(updated[index].h), h, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(last(updated[index].c), c, rtol=1e-4, atol=1e-6)
        x, of_rows = h, 0.0
    expected = h @ p["readout"]["kernel"] + p["readout"]["bias"]
    np.testing.assert_allclose(last(readout), expected, rtol=1e-4, atol=1e-5)


def test_coordinates_may_lie_on_one_axis():
    # With what rows, columns and the whole tensor share; there another product is taken.
    lstm, coordinates = LSTM((3, 2), outputs=2), (5, 4)
    shared = normal(3, 5, 1), normal(1, 1, 4), normal(2, 1, 1)
    memory = tuple(Memory(normal(n, 5, 4), normal(n, 5, 4)) for n in (3, 2))
    arguments = normal(2, 5, 4), shared, memory
    variables = random_params(lstm, *arguments)
    flat = jax.tree.map(functools.partial(flatten, coordinates), arguments)
    assert flat[1][2].shape == (2, 1) and flat[1][0].shape == (3, 20)
    found = jax.jit(lstm.apply)(variables, *flat)
    expected = jax.jit(lstm.apply)(variables, *arguments)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-5, atol=1e-6),
        found, expected,
    )  # fmt: skip


def test_coordinates_do_not_see_each_other():
    # One network for all coordinates: a permutation of them permutes what comes out.
    lstm = LSTM((3,), outputs=1)
    own, memory = normal(2, 6), (Memory(normal(3, 6), normal(3, 6)),)
    variables = random_params(lstm, own, (), memory)
    apply, order = jax.jit(lstm.apply), np.array([3, 0, 5, 1, 4, 2])
    shuffled = apply(variables, own[:, order], (), jax.tree.map(lambda a: a[:, order], memory))
    straight = jax.tree.map(lambda a: a[:, order], apply(variables, own, (), memory))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), shuffled, straight)


def test_fresh_weights_read_out_nothing():
    lstm = LSTM((4, 3), outputs=2)
    memory = tuple(Memory(jnp.zeros((n, 1)), jnp.zeros((n, 1))) for n in (4, 3))
    variables = jax.jit(lstm.init)(jax.random.key(0), jnp.ones((5, 1)), (), memory)
    readout, updated = lstm.apply(variables, jnp.ones((5, 1)), (), memory)
    np.testing.assert_array_equal(readout, np.zeros((2, 1)))
    assert all(np.all(layer.h != 0) for layer in updated)  # but the memory is at work


def test_affine_is_a_dense_layer_of_flax_with_the_features_first():
    # The same parameters from the same key, and the same product.
    flax, x, key = nn.Dense(12), normal(2, 5, 4), jax.random.key(0)
    features_last = np.moveaxis(x, 0, -1)
    fresh, expected = Affine(12).init(key, 2), jax.jit(flax.init)(key, features_last)
    jax.tree.map(np.testing.assert_array_equal, fresh, expected)
    variables = random_params(flax, features_last)
    found = np.moveaxis(affine(*Affine(12).apply(variables, 2), x), 0, -1)
    np.testing.assert_allclose(found, flax.apply(variables, features_last), rtol=1e-5, atol=1e-5)


def test_the_linear_map():
    # V s of each group, added up; nothing where nothing is shared, and zero before any training.
    linear, shared = Linear(3), (normal(2, 1, 1), normal(4, 5, 1))
    variables = random_params(linear, shared)
    kernels = [variables["params"][f"shared_{group}"]["kernel"] for group in (0, 1)]
    expected = np.einsum("fij,fo->oij", shared[0], kernels[0])
    expected = expected + np.einsum("fij,fo->oij", shared[1], kernels[1])
    np.testing.assert_allclose(linear.apply(variables, shared), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(linear.apply({"params": {}}, ()), np.zeros(3))
    fresh = linear.init(jax.random.key(0), shared)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fresh))
