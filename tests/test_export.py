"""Every compiled program lowers for TPUs and NVIDIA GPUs, on a machine that has neither.

`jax.export` applies the lowering rules of the platforms that are named, and raises where a
primitive has none there. What is written into a program by the name of a library's function it
does not look at: that is done here.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.tiny import CLASSES, IMAGE, random_meta_params, tiny_family, tiny_pool, tiny_task
from jax.tree_util import Partial

import advmeta
from advmeta import inner_gradients, optimizees
from advmeta.evaluation.versions import attack_list
from advmeta.meta_loss import MetaLossConfig
from advmeta.meta_optimizer import MetaOptimizerConfig, scale_by_meta_optimizer
from advmeta.meta_training import default_outer_optimizer, evaluate
from advmeta.meta_training_config import MetaTrainingConfig
from advmeta.outer_step import init_outer, outer_steps
from advmeta.unroll import with_replay

PLATFORMS = ("tpu", "cuda")
OPTIMIZEE = optimizees.mlp((3,), num_classes=CLASSES)
FAMILY = tiny_family(OPTIMIZEE)
KEY = jax.random.key(0)
PARAMS = jax.eval_shape(lambda: OPTIMIZEE.init(KEY, IMAGE))


def check_lowering(function, *args):
    """Exports ``function`` for `PLATFORMS`; raises where something in it is for CPUs only."""
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*args)
    assert exported.platforms == PLATFORMS
    assert re.findall(r"custom_call @(\w+)", exported.mlir_module()) == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jax.pure_callback(np.sin, x, x), "multi-platform lowering for python_callback"),
        (jnp.linalg.eigvals, "rule for primitive 'eig' not found for platforms .'tpu'"),
        (lambda x: jax.ffi.ffi_call("lapack_sgetrf_ffi", x)(x), "lapack_sgetrf_ffi"),
    ],
)
def test_the_check_finds_what_is_for_cpus_only(function, message):
    with pytest.raises((NotImplementedError, AssertionError), match=message):
        check_lowering(function, jnp.eye(2))


@pytest.mark.parametrize("estimator", ["backpropagation", "pes"])
def test_meta_training(estimator):
    config = MetaTrainingConfig(
        meta_optimizer=MetaOptimizerConfig(hidden=(2,)), lanes=2, truncation=2, horizon=(4, 8),
        estimator=estimator, meta_loss=MetaLossConfig(loss="calibrated"),
    )  # fmt: skip
    outer_optimizer, families = default_outer_optimizer(config), (FAMILY,)
    initialize = functools.partial(init_outer, config, families, outer_optimizer)
    state = jax.eval_shape(initialize, KEY)
    check_lowering(initialize, KEY)
    check_lowering(functools.partial(outer_steps, config, outer_optimizer, 2, families), state)
    check_lowering(functools.partial(evaluate, config, families), state.average, KEY)


@pytest.mark.parametrize("name", inner_gradients.RECIPES)
def test_inner_gradient(name):
    inner_gradient = inner_gradients.stateful(inner_gradients.by_name(name))

    def first(params, key):
        task = with_replay(tiny_task(OPTIMIZEE), key)
        return inner_gradient.apply(task, params, key, inner_gradient.init(task))

    check_lowering(first, PARAMS, KEY)


def test_update():
    config = MetaOptimizerConfig(hidden=(2, 3))

    def update(meta_params, gradient, params):
        optimizer = scale_by_meta_optimizer(meta_params, config)
        return optimizer.update(gradient, optimizer.init(params), params)

    check_lowering(update, random_meta_params(config), PARAMS, PARAMS)


STAGES = {
    "pgd": advmeta.attacks.pgd,
    **dict(attack_list("standard", CLASSES)[0]),  # one target of each; ranks are an argument
}


@pytest.mark.parametrize(
    ("name", "norm"),
    [("carlini-wagner", "l2"), *itertools.product(STAGES, ("linf", "l2", "l1"))],
)
def test_attack(name, norm):
    threat_model = advmeta.ThreatModel(norm, 0.1)
    logits_fn = Partial(OPTIMIZEE.apply, PARAMS)
    attacks = STAGES | {"carlini-wagner": advmeta.attacks.carlini_wagner}
    x, y = tiny_pool(4)

    def attack(logits_fn, x, y, key):
        return attacks[name](logits_fn, x, y, threat_model=threat_model, key=key)._replace(note=())

    check_lowering(attack, logits_fn, x, y, KEY)
