"""The meta-optimizer as an optax transformation, with every feature set, beside optax.adam."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.steps import (
    GRADIENTS_T,
    PARAMS,
    PARAMS_T,
    STEPS,
    assert_close,
    assert_equal,
    at,
    compile_update,
    loop,
)
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import random_meta_params
from optax._src.base import NO_PARAMS_MSG

from advmeta.meta_optimizer import (
    DEFAULT_FEATURES,
    MetaOptimizerConfig,
    scale_by_meta_optimizer,
)

KERNEL = {"layer_0": {"bias": False, "kernel": True}}  # a mask

CONFIGS = {
    "log_sign": MetaOptimizerConfig((2,), ("log_sign",)),
    "adam": MetaOptimizerConfig((2,), ("adam",)),
    "parameter": MetaOptimizerConfig((2,), ("parameter",)),
    "jacobian": MetaOptimizerConfig((2,), ("jacobian",)),
    "layer": MetaOptimizerConfig((2,), ("layer",)),
    "reach": MetaOptimizerConfig((2,), ("adam", "reach")),
    "log_sign+adam": MetaOptimizerConfig((2,), ("log_sign", "adam")),
    "all": MetaOptimizerConfig((2, 3), DEFAULT_FEATURES, regularisation=0.1),
    "short memory": MetaOptimizerConfig((2, 3), ("log_sign", "adam"), memory_dtype="bfloat16"),
}
OPTIMIZERS = [*CONFIGS, "optax.adam"]


def make(name):
    if name == "optax.adam":
        return optax.with_extra_args_support(optax.adam(1e-2))
    return scale_by_meta_optimizer(random_meta_params(CONFIGS[name]), CONFIGS[name])


@functools.cache
def compiled(name):
    """The optimizer with a compiled update, which the tests share."""
    return compile_update(make(name))


@functools.cache
def reference(name):
    return loop(compiled(name))


def kernels(updates):
    return [u["layer_0"]["kernel"] for u in updates]


def biases(updates):
    return [u["layer_0"]["bias"] for u in updates]


# What must hold of an optax optimizer, one function a row of the table.


def chain_after_clip(name):
    # Clipping to 0.5 is the optimizer on g * min(1, 0.5 / ||g||).
    norms = [optax.global_norm(at(GRADIENTS_T, t)) for t in range(STEPS)]
    factors = np.minimum(1, 0.5 / np.array(norms))
    assert factors.max() < 1
    clipped = jax.tree.map(lambda g: (g.T * factors).T.astype(np.float32), GRADIENTS_T)
    chained = optax.chain(optax.clip_by_global_norm(0.5), compiled(name))
    assert_close(loop(chained)[0], loop(compiled(name), clipped)[0], rtol=1e-4, atol=1e-5)


def masked(name):
    updates, _ = loop(optax.masked(compiled(name), KERNEL))
    assert_close(kernels(updates), kernels(reference(name)[0]))
    assert_equal(biases(updates), [at(GRADIENTS_T, t)["layer_0"]["bias"] for t in range(STEPS)])


def partition(name):
    labels = {"layer_0": {"bias": "sgd", "kernel": "learned"}}
    parts = {"sgd": optax.sgd(0.1), "learned": compiled(name)}
    updates, _ = loop(optax.partition(parts, labels))
    assert_close(kernels(updates), kernels(reference(name)[0]))
    sgd = [-0.1 * at(GRADIENTS_T, t)["layer_0"]["bias"] for t in range(STEPS)]
    assert_close(biases(updates), sgd)


def multi_steps(name):
    # Three updates of zero, then the optimizer's first, on the mean gradient.
    params = jax.tree.map(lambda p: np.stack([p[3]] * STEPS), PARAMS_T)
    updates, _ = loop(compile_update(optax.MultiSteps(compiled(name), 4)), params=params)
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    for t in range(3):
        assert_equal(updates[t], zeros)
    mean = jax.tree.map(lambda g: g.mean(axis=0), GRADIENTS_T)
    first, _ = compiled(name).update(mean, compiled(name).init(PARAMS), at(params, 3))
    assert_close(updates[3], first, rtol=1e-4)


def apply_if_finite(name):
    # A step with a NaN gives an update of zero, and the others as if it had not been.
    with_nan = jax.tree.map(lambda g: np.insert(g, 1, np.nan, axis=0), GRADIENTS_T)
    params = jax.tree.map(lambda p: np.insert(p, 1, p[0], axis=0), PARAMS_T)
    wrapped = compile_update(optax.apply_if_finite(compiled(name), 2))
    updates, state = loop(wrapped, with_nan, params)
    assert_equal(updates.pop(1), jax.tree.map(np.zeros_like, PARAMS))
    assert int(state.total_notfinite) == 1
    assert_close(updates, reference(name)[0])


def inject_hyperparams(name):
    factory = optax.inject_hyperparams(lambda step: optax.chain(compiled(name), optax.scale(step)))
    optimizer = factory(step=0.5)
    updates, state = optimizer.update(at(GRADIENTS_T, 0), optimizer.init(PARAMS), at(PARAMS_T, 0))
    assert_close(updates, jax.tree.map(lambda u: 0.5 * u, reference(name)[0][0]))
    state.hyperparams["step"] = jnp.float32(2.0)
    updates, _ = optimizer.update(at(GRADIENTS_T, 1), state, at(PARAMS_T, 1))
    assert_close(updates, jax.tree.map(lambda u: 2 * u, reference(name)[0][1]))


def schedule(name):
    scheduled = optax.chain(compiled(name), optax.scale_by_schedule(lambda t: 1 / (1.0 + t)))
    updates, _ = loop(scheduled)
    for t, (u, v) in enumerate(zip(updates, reference(name)[0], strict=True)):
        assert_close(u, jax.tree.map(lambda leaf, t=t: leaf / (1 + t), v))


def scan(name):
    optimizer = make(name)

    def step(state, inputs):
        updates, state = optimizer.update(inputs[0], state, inputs[1])
        return state, updates

    @jax.jit
    def run(gradients, params):
        return jax.lax.scan(step, optimizer.init(at(params, 0)), (gradients, params))

    state, updates = run(GRADIENTS_T, PARAMS_T)
    assert_close([at(updates, t) for t in range(STEPS)], reference(name)[0])
    assert_close(state, reference(name)[1])


def bfloat16(name):
    # In a scan and in both branches of a cond the state must keep its types to the bit.
    optimizer = make(name)
    gradients, params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (GRADIENTS_T, PARAMS_T))

    def step(state, inputs):
        updates, stepped = optimizer.update(inputs[0], state, inputs[1])
        return jax.lax.cond(inputs[2], lambda: stepped, lambda: state), updates

    @jax.jit
    def run(gradients, params):
        taken = jnp.ones(STEPS, bool)
        return jax.lax.scan(step, optimizer.init(at(params, 0)), (gradients, params, taken))

    _, updates = run(gradients, params)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(updates)}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    assert {u.dtype for u in jax.tree.leaves(reference(name)[0])} == {jnp.dtype(jnp.float32)}
    # 8 bits in the parameters and gradients: updates agree to a few per cent of the largest.
    largest = max(float(jnp.abs(u).max()) for u in jax.tree.leaves(reference(name)[0]))
    wide = jax.tree.map(lambda u: np.asarray(u, np.float32), updates)
    assert_close([at(wide, t) for t in range(STEPS)], reference(name)[0], 0.05, 0.05 * largest)


def vmap_is_a_loop(name):
    optimizer = make(name)
    states = jax.vmap(optimizer.init)(PARAMS_T)
    updates, states = jax.jit(jax.vmap(optimizer.update))(GRADIENTS_T, states, PARAMS_T)
    for t in range(STEPS):
        state = compiled(name).init(PARAMS)
        expected = compiled(name).update(at(GRADIENTS_T, t), state, at(PARAMS_T, t))
        assert_close((at(updates, t), at(states, t)), expected)


def eager(name):
    optimizer = make(name)
    found = loop(optimizer, jax.tree.map(lambda g: g[:2], GRADIENTS_T))
    assert_close(found[0], reference(name)[0][:2])


def donation(name):
    optimizer = compiled(name)
    update = jax.jit(make(name).update, donate_argnums=1)
    state = optimizer.init(PARAMS)
    before = jax.tree.leaves(state)
    updates, _ = update(at(GRADIENTS_T, 0), state, at(PARAMS_T, 0))
    assert all(leaf.is_deleted() for leaf in before)
    assert_close(updates, reference(name)[0][0])


def no_second_compilation(name):
    reference(name)
    # One for gradients as they are, one for those that a mask or a partition leaves.
    traces = compiled(name).update._cache_size()
    loop(compiled(name), GRADIENTS_T, PARAMS_T, reference(name)[1])
    assert compiled(name).update._cache_size() == traces >= 1


def empty_tree(name):
    state = make(name).init({})
    updates, state = make(name).update({}, state, {})
    assert updates == {}
    assert jax.tree.structure(state) == jax.tree.structure(make(name).init({}))


def masked_nodes(name):
    node = optax.MaskedNode()
    params, gradients = ({"layer_0": {**t["layer_0"], "bias": node}} for t in
                         (at(PARAMS_T, 0), at(GRADIENTS_T, 0)))  # fmt: skip
    updates, _ = compiled(name).update(gradients, compiled(name).init(params), params)
    assert updates["layer_0"]["bias"] == node
    assert_close(kernels([updates]), kernels(reference(name)[0][:1]))


def map_params(name):
    state = reference(name)[1]
    assert_equal(optax.tree.map_params(make(name), lambda leaf: leaf, state), state)
    # Everything with a parameter's axes is mapped, the counter is not.
    zeroed = optax.tree.map_params(make(name), jnp.zeros_like, state)
    kept = [leaf for leaf in jax.tree.leaves(zeroed) if jnp.any(leaf != 0)]
    assert [leaf.tolist() for leaf in kept] == [STEPS]


def extra_arguments(name):
    state = compiled(name).init(PARAMS)
    inputs = at(GRADIENTS_T, 0), state, at(PARAMS_T, 0)
    updates, _ = make(name).update(*inputs, value=1.0, unheard_of="x")
    assert_close(updates, reference(name)[0][0])


def init_of_shapes(name):
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    assert_equal(make(name).init(shapes), make(name).init(PARAMS))


def missing_params(name):
    optimizer = make(name)
    state, gradient = optimizer.init(PARAMS), at(GRADIENTS_T, 0)
    if name != "optax.adam" and CONFIGS[name].needs_params:
        with pytest.raises(ValueError) as error:
            optimizer.update(gradient, state)
        assert str(error.value) == NO_PARAMS_MSG
    else:
        assert_close(optimizer.update(gradient, state)[0], reference(name)[0][0])


PROPERTIES = [
    chain_after_clip, masked, partition, multi_steps, apply_if_finite, inject_hyperparams,
    schedule, scan, bfloat16, vmap_is_a_loop, eager, donation, no_second_compilation, empty_tree,
    masked_nodes, map_params, extra_arguments, init_of_shapes, missing_params,
]  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda f: f.__name__)
def test_optax_property(holds, name):
    holds(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_new_meta_params_are_an_argument_and_not_a_recompilation(name):
    config, traces = CONFIGS[name], []

    @jax.jit
    def first_update(meta_params):
        traces.append(1)
        optimizer = scale_by_meta_optimizer(meta_params, config)
        return optimizer.update(at(GRADIENTS_T, 0), optimizer.init(PARAMS), at(PARAMS_T, 0))[0]

    assert_close(first_update(random_meta_params(config)), reference(name)[0][0])
    other = first_update(random_meta_params(config, seed=1))
    assert len(traces) == 1
    assert float(jnp.abs(kernels([other])[0] - kernels(reference(name)[0])[0]).max()) > 1e-4


def test_a_short_memory_is_the_long_one_rounded():
    # From the same memory both take the same step, and one of them rounds what it leaves.
    short = CONFIGS["short memory"]
    long = dataclasses.replace(short, memory_dtype="float32")
    state, found = reference("short memory")[1], []
    wide = jax.tree.map(lambda m: m.astype(jnp.float32), state.memory)
    for config, memory in ((short, state.memory), (long, wide)):
        optimizer = compile_update(scale_by_meta_optimizer(random_meta_params(config), config))
        args = at(GRADIENTS_T, 0), state._replace(memory=memory), at(PARAMS_T, 0)
        found.append(optimizer.update(*args))
    (updates, after), (expected, exact) = found
    assert_close(updates, expected)
    # To 8 bits: half of a unit in the last of them is 2^-8 at most.
    rounded = jax.tree.map(lambda m: m.astype(jnp.float32), after.memory)
    assert_close(rounded, exact.memory, rtol=2**-8)
    for dtype, trees in ((jnp.bfloat16, after.memory), (jnp.float32, (after.mu, after.nu))):
        assert {leaf.dtype for leaf in jax.tree.leaves(trees)} == {jnp.dtype(dtype)}


def test_no_gradient_flows_through_the_gradients():
    config = CONFIGS["log_sign+adam"]
    optimizer = scale_by_meta_optimizer(random_meta_params(config), config)

    @jax.jit
    @jax.grad
    def sensitivity(gradient):
        updates, _ = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
        return sum(u.sum() for u in jax.tree.leaves(updates))

    assert_equal(sensitivity(at(GRADIENTS_T, 0)), jax.tree.map(np.zeros_like, PARAMS))


def test_weights_that_do_not_fit_are_named():
    config = CONFIGS["all"]
    meta_params = random_meta_params(config)
    wider = MetaOptimizerConfig((2, 4), DEFAULT_FEATURES)
    with pytest.raises(ValueError, match=r"\['lstm'\]\['own_1'\]\['bias'\] has shape \(12,\), but "
                                         r"the config needs \(16,\)"):  # fmt: skip
        scale_by_meta_optimizer(meta_params, wider)
    del meta_params["lstm"]["readout"]["bias"]
    with pytest.raises(ValueError, match=r"\['lstm'\]\['readout'\]\['bias'\] has shape None"):
        scale_by_meta_optimizer(meta_params, config)
    extra = random_meta_params(config) | {"more": np.zeros(3)}
    with pytest.raises(ValueError, match=r"\['more'\] has shape \(3,\).* needs None"):
        scale_by_meta_optimizer(extra, config)
