"""What needs eight devices; `test_sharding.py` runs this in a process that has as many."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.tiny import CLASSES, random_like, random_meta_params, tiny_family
from fixtures.tiny import compile_fast as compile_fast
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_transform import OPTIMIZERS, make

from advmeta import optimizees
from advmeta.meta_loss import MetaLossConfig
from advmeta.meta_optimizer import MetaOptimizerConfig, scale_by_meta_optimizer
from advmeta.meta_training import default_outer_optimizer
from advmeta.meta_training_config import MetaTrainingConfig
from advmeta.outer_step import init_outer, outer_steps
from advmeta.sharding import check_mesh, on_every_device
from advmeta.types import Optimizee

CONFIG = MetaTrainingConfig(
    meta_optimizer=MetaOptimizerConfig(hidden=(2,)),
    lanes=8,
    truncation=2,
    horizon=(4, 8),
    estimator="backpropagation",
    meta_loss=MetaLossConfig(loss="calibrated", every=1),
)
KEY = jax.random.key(0)
OUTER = default_outer_optimizer(CONFIG)
LINEAR = optimizees.linear(num_classes=CLASSES)


def make_mesh(shape, *names):
    return check_mesh(jax.make_mesh(shape, names), CONFIG.lanes)


def fresh(optimizee, mesh=None):
    family, key = on_every_device((tiny_family(optimizee), KEY), mesh)
    return family, init_outer(CONFIG, (family,), OUTER, key, mesh)


def compile_steps(family, state):
    """Two outer steps as a compiled program."""
    return outer_steps.lower(CONFIG, OUTER, 2, (family,), state).compile()


def weights_after(calls, steps, family, state):
    for _ in range(calls):
        state, infos = steps((family,), state)
        assert infos.finite.all()
    return jax.device_get(state.average)


@pytest.fixture(scope="module")
def on_one_device():
    """The weights after six steps: on the way every lane comes to a horizon."""
    family, state = fresh(LINEAR)
    return weights_after(3, compile_steps(family, state), family, state)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)


def collectives(compiled):
    """What goes between devices in a compiled program: (operation, shape of an array) pairs."""
    found = []
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    for shapes, name in re.findall(rf"= (.*) ({names})(?:-start)?\(", compiled.as_text()):
        for dims in re.findall(r"\w+\[([\d,]*)\]", shapes):
            found.append((name, tuple(int(d) for d in dims.split(",") if d)))
    return found


def test_lanes_stay_on_their_devices_and_the_weights_are_those_of_one(on_one_device):
    family, state = fresh(LINEAR, make_mesh((8,), "data"))
    for leaf in jax.tree.leaves(state.lanes):
        assert leaf.addressable_shards[0].data.shape == (1, *leaf.shape[1:])
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state._replace(lanes=())))
    steps = compile_steps(family, state)
    after, _ = steps.output_shardings
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    found = collectives(steps)
    assert {name for name, _ in found} == {"all-reduce"}
    # The meta-gradient, the meta-loss and the number of lost episodes; nothing of a lane.
    meta_params = sum(leaf.size for leaf in jax.tree.leaves(state.meta_params))
    assert sum(math.prod(shape) for _, shape in found) == meta_params + 2
    assert_close(weights_after(3, steps, family, state), on_one_device)


def test_an_optimizee_may_be_split_over_an_axis_of_its_own(on_one_device):
    mesh = make_mesh((2, 4), "data", "model")
    split = {"bias": P(), "kernel": P("model")}  # a pixel a device

    def init(key, x_shape):
        shardings = {"layer_0": {name: NamedSharding(mesh, spec) for name, spec in split.items()}}
        return jax.lax.with_sharding_constraint(LINEAR.init(key, x_shape), shardings)

    family, state = fresh(Optimizee(init, LINEAR.apply), mesh)
    # From the first step on, the optimizer's state is split as the parameters are.
    state, _ = outer_steps(CONFIG, OUTER, 2, (family,), state)
    steps = compile_steps(family, state)
    inner = steps.output_shardings[0].lanes[0].inner
    memory = inner.opt_state.memory[0]
    for tree in (inner.params, inner.opt_state.mu, inner.opt_state.nu):
        assert tree["layer_0"]["kernel"].spec == P("data", "model")
    for tree in memory:
        assert tree["layer_0"]["kernel"].spec == P("data", None, "model")
    assert {name for name, _ in collectives(steps)} == {"all-reduce"}
    assert_close(weights_after(2, steps, family, state), on_one_device)


def test_an_update_leaves_every_parameter_where_it_is():
    config = MetaOptimizerConfig(hidden=(2,))
    mesh = make_mesh((4, 2), "data", "model")
    params = random_like({"kernel": np.zeros((32, 16), np.float32)})
    params = jax.device_put(params, NamedSharding(mesh, P("data", "model")))
    optimizer = scale_by_meta_optimizer(random_meta_params(config), config)
    state = optimizer.init(params)
    compiled = jax.jit(optimizer.update).lower(params, state, params).compile()
    found = collectives(compiled)
    assert {name for name, _ in found} == {"all-reduce"}
    # Means of rows and columns, each of a device's part, and sums.
    assert max(math.prod(shape) for _, shape in found) <= 8


SPEC = {"bias": P("column"), "kernel": P("row", "column"), "kernel_2": P("row", "column")}
SHAPE = {"bias": (4,), "kernel": (8, 4), "kernel_2": (4, 2)}


def count_sharded(tree):
    """How many arrays the tree has; each must lie as the parameter of its name does."""
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.ndim == 0:
            continue
        name = path[-1].key
        spec = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
        more = leaf.ndim - len(SHAPE[name])
        assert leaf.shape[more:] == SHAPE[name], (path, leaf.shape)
        assert spec == (None,) * more + tuple(SPEC[name]), (path, spec)
        found += 1
    return found


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharding_is_inherited_from_the_parameters(name, axis_type):
    mesh = jax.make_mesh((4, 2), ("row", "column"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        params = {
            leaf: jax.device_put(jnp.ones(SHAPE[leaf]), NamedSharding(mesh, SPEC[leaf]))
            for leaf in SPEC
        }
        optimizer = make(name)
        fresh = optimizer.init(params)
        assert count_sharded(fresh) >= 4
        updates, state = jax.jit(optimizer.update)(params, fresh, params)
        assert count_sharded(state) >= 4 and count_sharded(updates) == 3
        if axis_type == AxisType.Explicit:
            assert jax.tree.map(jax.typeof, fresh) == jax.tree.map(jax.typeof, state)


def test_an_axis_of_one_device_and_a_layer_with_one_output_on_it():
    mesh = jax.make_mesh((8, 1), ("row", "column"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("row", "column"))
        params, optimizer = {"kernel": jax.device_put(jnp.ones((8, 1)), sharding)}, make("all")
        updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        assert jax.typeof(updates["kernel"]) == jax.typeof(params["kernel"])
