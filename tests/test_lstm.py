import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from fixtures.tiny import compile_fast as compile_fast

from advmeta.meta_optimizer.lstm import LSTM, Gates, Linear, Memory

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
    own, shared = normal(5, 4, 2), normal(5, 1, 3)
    memory = tuple(Memory(normal(5, 4, n), normal(5, 4, n)) for n in (3, 2))
    variables = random_params(lstm, own, (shared,), memory)
    readout, updated = jax.jit(lstm.apply)(variables, own, (shared,), memory)

    p = variables["params"]
    x, of_rows = own, shared @ p["shared_0"]["kernel"]
    for index, (h, c) in enumerate(memory):
        dense = p[f"own_{index}"]
        gates = np.concatenate([x, h], axis=-1) @ dense["kernel"] + of_rows + dense["bias"]
        i, f, g, o = np.split(gates, 4, axis=-1)
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        np.testing.assert_allclose(updated[index].h, h, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(updated[index].c, c, rtol=1e-4, atol=1e-6)
        x, of_rows = h, 0.0
    expected = h @ p["readout"]["kernel"] + p["readout"]["bias"]
    np.testing.assert_allclose(readout, expected, rtol=1e-4, atol=1e-5)


def test_coordinates_do_not_see_each_other():
    # One network for all coordinates: a permutation of them permutes what comes out.
    lstm = LSTM((3,), outputs=1)
    own, memory = normal(6, 2), (Memory(normal(6, 3), normal(6, 3)),)
    variables = random_params(lstm, own, (), memory)
    apply, order = jax.jit(lstm.apply), np.array([3, 0, 5, 1, 4, 2])
    shuffled = apply(variables, own[order], (), jax.tree.map(lambda a: a[order], memory))
    straight = jax.tree.map(lambda a: a[order], apply(variables, own, (), memory))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), shuffled, straight)


def test_fresh_weights_read_out_nothing():
    lstm = LSTM((4, 3), outputs=2)
    memory = tuple(Memory(jnp.zeros((1, n)), jnp.zeros((1, n))) for n in (4, 3))
    variables = jax.jit(lstm.init)(jax.random.key(0), jnp.ones((1, 5)), (), memory)
    readout, updated = lstm.apply(variables, jnp.ones((1, 5)), (), memory)
    np.testing.assert_array_equal(readout, np.zeros((1, 2)))
    assert all(np.all(layer.h != 0) for layer in updated)  # but the memory is at work


def test_gates_are_the_quarters_of_a_dense_layer():
    # The same parameters from the same key, so that weights on disk fit, and the same product.
    gates, dense, x, key = Gates(3), nn.Dense(12), normal(5, 4, 2), jax.random.key(0)
    fresh, expected = (jax.jit(layer.init)(key, x) for layer in (gates, dense))
    jax.tree.map(np.testing.assert_array_equal, fresh, expected)
    variables = random_params(dense, x)
    found = np.concatenate(gates.apply(variables, x), axis=-1)
    np.testing.assert_allclose(found, dense.apply(variables, x), rtol=1e-5, atol=1e-5)


def test_the_linear_map():
    # V s of each group, added up; nothing where nothing is shared, and zero before any training.
    linear, shared = Linear(3), (normal(2), normal(5, 1, 4))
    variables = random_params(linear, shared)
    kernels = [variables["params"][f"shared_{group}"]["kernel"] for group in (0, 1)]
    expected = shared[0] @ kernels[0] + shared[1] @ kernels[1]
    np.testing.assert_allclose(linear.apply(variables, shared), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(linear.apply({"params": {}}, ()), np.zeros(3))
    fresh = linear.init(jax.random.key(0), shared)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fresh))
