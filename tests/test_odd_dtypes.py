"""Parameters, aims and precisions that a pipeline may hold beside plain float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.tiny import compile_fast as compile_fast

import advmeta
from advmeta import inner_gradients
from advmeta.meta_optimizer.transform import scale_by_meta_optimizer
from advmeta.unroll import init_inner, with_replay

KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), (16, 6))
Y = (X.sum(axis=1) > 3).astype(int)


def half_init(key, shape):
    layers = {"kernel": jax.random.normal(key, (shape[-1], 2)), "bias": jnp.zeros(2)}
    return optax.tree.cast({"out": layers}, jnp.bfloat16)


def half_apply(params, x):
    return x.astype(jnp.bfloat16) @ params["out"]["kernel"] + params["out"]["bias"]


HALF = advmeta.Optimizee(half_init, half_apply)


def meta_optimizer(aim=advmeta.Aim(), **options):
    config = advmeta.MetaOptimizerConfig((2,), **options)
    return scale_by_meta_optimizer(advmeta.init_meta_params(config, KEY), config, aim)


def test_a_number_of_python_is_a_parameter_as_to_optax():
    params = {"w": jnp.ones((3, 2)), "temperature": 1.0}
    arrays = jax.tree.map(jnp.asarray, params)
    optimizer = meta_optimizer()
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    expected, _ = optimizer.update(arrays, optimizer.init(arrays), arrays)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    optax.apply_updates(params, updates)


def test_complex_parameters_are_refused_with_what_to_write():
    params = {"w": jnp.ones((3, 2), jnp.complex64)}
    with pytest.raises(ValueError, match="split_real_and_imaginary"):
        meta_optimizer().init(params)
    optimizer = optax.contrib.split_real_and_imaginary(meta_optimizer())
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert updates["w"].dtype == jnp.complex64


@pytest.mark.parametrize("feature", ["aim", "jacobian", "reach"])
def test_every_feature_that_looks_at_the_aim_refuses_what_is_none(feature):
    for aim, message in (
        (advmeta.Aim(0.1, "l1"), "l1"),  # pyright: ignore[reportArgumentType]
        (advmeta.Aim(-0.2), r"epsilon=-0\.2"),
        (advmeta.Aim(float("nan")), "epsilon=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            meta_optimizer(aim, features=("adam", feature))
    meta_optimizer(advmeta.Aim(jnp.array(0.2), "l2"), features=("adam", feature))
    jax.jit(lambda epsilon: meta_optimizer(advmeta.Aim(epsilon)) and 0)(0.2)  # traced: unknown


@pytest.mark.parametrize("features", [("log_sign", "adam"), None])
def test_with_x64_the_state_keeps_its_dtypes(features):
    with jax.enable_x64(True):
        mixed = {"a": {"kernel": jnp.ones((4, 3), jnp.float64)},
                 "b": {"kernel": jnp.ones((3, 2), jnp.float32)}}  # fmt: skip
        for params in (mixed, optax.tree.cast(mixed, jnp.float32)):
            optimizer = meta_optimizer(**({} if features is None else {"features": features}))
            state = optimizer.init(params)
            updates, after = optimizer.update(params, state, params)
            assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
            assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)


@pytest.mark.parametrize("attack", ["pgd", "square"])
def test_with_x64_images_of_32_bits_are_attacked(attack):
    with jax.enable_x64(True):
        w = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))  # logits of 64 bits
        x, ball = X.astype(jnp.float32), advmeta.ThreatModel("linf", 0.1)
        result = getattr(advmeta.attacks, attack)(lambda x: x @ w, x, Y, threat_model=ball, key=KEY)
        assert result.x_adv.dtype == result.loss.dtype == jnp.float32


def test_an_initial_scale_does_not_change_the_precision():
    batch, ball = advmeta.Batch(X, Y), advmeta.ThreatModel("linf", 0.1)
    task = advmeta.Task(
        batch, batch, ball, HALF, batch_size=8, initial_scale=jnp.float32(1.5), noise=0.1
    )
    state = init_inner(task, optax.sgd(0.1), KEY)
    assert {p.dtype for p in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(inner_gradients.noisy(task, state.params, KEY)[0])
    assert with_replay(task, KEY).replay.dtype == jnp.float32


def test_a_model_of_half_precision_is_patched_in_half_precision():
    patched, _ = advmeta.patch(
        half_apply, half_init(KEY, (6,)), X, Y, key=KEY, steps=20, batch_size=8,
        threat_model=advmeta.ThreatModel("linf", 0.1), meta_optimizer=optax.sgd(0.1),
        max_clean_drop=1.0,
    )  # fmt: skip
    assert {p.dtype for p in jax.tree.leaves(patched)} == {jnp.dtype(jnp.bfloat16)}
