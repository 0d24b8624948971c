"""The kernel, interpreted on the CPU, against `LSTM.apply`; ragged and padded in every way."""

import jax
import numpy as np
import pytest
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import random_like, random_meta_params

from advmeta.meta_optimizer import MetaOptimizerConfig, fused, scale_by_meta_optimizer
from advmeta.meta_optimizer.lstm import LSTM, Memory

# Coordinates that are fewer than a block, whole blocks, and a block and one more.
SHAPES = [(3,), (2 * fused.BLOCK,), (5, 13)]


def inputs(hidden, shape, shared):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    lstm, own, ones = LSTM(hidden, outputs=3), normal(5, *shape), [1] * len(shape)
    rows = (normal(4, *ones), normal(1, shape[0], *ones[1:]), normal(2, *ones))
    memory = tuple(Memory(normal(n, *shape), normal(n, *shape)) for n in hidden)
    arguments = own, rows if shared else (), memory
    shapes = jax.eval_shape(lambda: lstm.init(jax.random.key(0), *arguments))["params"]
    params = jax.tree.map(lambda x: normal(*x.shape) / 2, shapes)
    found = jax.eval_shape(fused.apply, params, *arguments)
    weights = jax.tree.map(lambda x: normal(*x.shape), found)
    return lstm, (params, *arguments), weights


def assert_close(a, b, atol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, 1e-5, atol), a, b)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("hidden", "shape"), [((3, 18), s) for s in SHAPES] + [((8,), (65,))])
def test_it_is_the_lstm_forward_and_backward(hidden, shape, shared):
    # The gradient of a random linear function of all that comes out, by all that goes in.
    lstm, arguments, weights = inputs(hidden, shape, shared)

    def by_flax(params, *rest):
        return lstm.apply({"params": params}, *rest)

    def look(function):
        def score(*arguments):
            found = function(*arguments)
            parts = jax.tree.map(lambda w, x: (w * x).sum(), weights, found)
            return sum(jax.tree.leaves(parts)), found

        return jax.jit(jax.grad(score, argnums=(0, 1, 2, 3), has_aux=True))(*arguments)

    (gradient, found), (expected_gradient, expected) = look(fused.apply), look(by_flax)
    assert_close(found, expected)
    # Of the weights it is a sum over coordinates: as exact as that many roundings allow.
    assert_close(gradient, expected_gradient, atol=1e-5 * np.sqrt(np.prod(shape)))


def test_vmap_is_a_loop():
    _, arguments, _ = inputs((3,), (5, 13), True)
    two = jax.tree.map(lambda x: np.stack([x, -x]), arguments)
    together = jax.jit(jax.vmap(fused.apply))(*two)
    for n in range(2):
        one, found = jax.tree.map(lambda x, n=n: x[n], (two, together))
        assert_close(found, jax.jit(fused.apply)(*one))


def test_the_update_is_the_same():
    # Leaves of every rank, and one without a number in it.
    params = {"a": np.ones(()), "b": np.ones(3), "c": np.ones((3, 70)), "d": np.ones((0, 2))}
    params = random_like(jax.tree.map(np.float32, params))
    config = MetaOptimizerConfig(hidden=(2, 3))
    found = []
    for kernel in ("xla", "pallas"):
        optimizer = scale_by_meta_optimizer(random_meta_params(config), config, kernel=kernel)
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = jax.jit(optimizer.update)(random_like(params, 1), state, params)
        found.append((updates, state))
    assert_close(*found)
    with pytest.raises(ValueError, match="kernel='triton' is unknown: write 'xla' or 'pallas'"):
        scale_by_meta_optimizer(random_meta_params(config), config, kernel="triton")


@pytest.mark.parametrize("hidden", [(8,), (20, 20)])
def test_forward_and_backward_lower_for_gpus(hidden):
    _, arguments, weights = inputs(hidden, (9, 13), True)

    def pull_back(*arguments):
        return jax.vjp(fused.apply, *arguments)[1](weights)

    lanes = jax.tree.map(lambda x: np.stack([x, x]), arguments)
    triton = "__gpu$xla.gpu.triton"
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(triton)]
    for function, given in ((pull_back, arguments), (jax.vmap(fused.apply), lanes)):
        export = jax.export.export(
            jax.jit(function), platforms=["cuda"], disabled_checks=unchecked
        )  # fmt: skip
        assert triton in export(*given).mlir_module()
