"""Backpropagation through a truncation: against finite differences, and its memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import random_like, random_meta_params, tiny_family, tiny_pool

from advmeta import inner_gradients, optimizees
from advmeta.attacks.losses import margin
from advmeta.inner_gradients import attacked, mean_cross_entropy
from advmeta.meta_loss import MetaLossConfig
from advmeta.meta_optimizer import FEATURES, Aim, MetaOptimizerConfig, scale_by_meta_optimizer
from advmeta.meta_training_config import MetaTrainingConfig
from advmeta.outer_step import new_lane, run_truncation
from advmeta.tasks import draw

KEY = jax.random.key(0)
CONFIG = MetaTrainingConfig(
    meta_optimizer=MetaOptimizerConfig(hidden=(2,)),
    meta_loss=MetaLossConfig(attack_steps=1, loss="calibrated", every=1),
    estimator="backpropagation",
    truncation=2,
    horizon=(4, 8),
)


def test_meta_gradient_agrees_with_finite_differences():
    # Nothing is differentiated through the losses and gradients that enter the LSTM nor through the
    # attack, so the derivative is that of a run in which they stay as they are at phi: they are
    # recorded there and replayed while phi moves. That run is written as a Python loop. The pull
    # and the reach count as constants, too, and are left out.
    seen = tuple(name for name in FEATURES if name not in ("jacobian", "reach"))
    with jax.enable_x64(True):
        pool = tiny_pool(dtype=np.float64)
        family = tiny_family(optimizees.mlp((3,), "tanh", 3), pool)
        weights = MetaLossConfig(
            1.0, 0.5, attack_steps=2, every=1, examples=4, lateness=0.0, loss="cross_entropy"
        )
        config = dataclasses.replace(
            CONFIG, meta_loss=weights, truncation=3, horizon=(3, 3), horizon_known=0.0,
            meta_optimizer=MetaOptimizerConfig((2, 2), seen, learning_rate=0.1),
        )  # fmt: skip
        phi = random_meta_params(config.meta_optimizer, dtype=np.float64)
        lane = jax.jit(lambda phi: new_lane(config, family, phi, KEY))(phi)
        # A memory and moments of an episode in progress, not zeros.
        opt_state = lane.inner.opt_state
        opt_state = opt_state._replace(
            memory=random_like(opt_state.memory, scale=0.5),
            mu=random_like(opt_state.mu, scale=0.1),
            nu=jax.tree.map(abs, random_like(opt_state.nu, seed=1)),
            count=jnp.int32(47),  # past the warm-up
        )
        lane = lane._replace(inner=lane.inner._replace(opt_state=opt_state))
        task_key, _, episode_key = jax.random.split(lane.key, 3)
        task = family.sample(task_key)

        def run(phi, recorded=None):
            aim = Aim(task.threat_model.epsilon)
            optimizer = scale_by_meta_optimizer(phi, config.meta_optimizer, aim)
            (params, opt_state, *_), loss, record = lane.inner, 0.0, []
            for t in range(3):
                gradient_key, evaluation_key = jax.random.split(jax.random.fold_in(episode_key, t))
                draw_key, attack_key = jax.random.split(evaluation_key)
                batch = draw(task.held_out, draw_key, 4)
                if recorded is None:
                    value, gradient = inner_gradients.clean(task, params, gradient_key)
                else:
                    value, gradient, moved = recorded[t]
                updates, opt_state = optimizer.update(gradient, opt_state, params, value=value)
                params = optax.apply_updates(params, updates)
                if recorded is None:
                    moved = attacked(task, params, batch, attack_key, 2, margin)
                loss += mean_cross_entropy(task, params, moved) / 3
                loss += 0.5 * mean_cross_entropy(task, params, batch) / 3
                record.append((value, gradient, moved))
            return loss, record

        objective = functools.partial(run_truncation, config, family)
        loss, gradient = jax.jit(
            jax.value_and_grad(lambda phi: objective(phi, lane)[0])
        )(phi)  # fmt: skip
        assert loss.dtype == jnp.float64
        expected, recorded = jax.jit(run)(phi)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)

        # One direction a leaf, so that each is checked, and four at random through all of them.
        leaves, treedef = jax.tree.flatten(phi)
        rng = np.random.default_rng(1)
        directions = [
            [rng.normal(size=leaf.shape) * (only in (i, None)) for i, leaf in enumerate(leaves)]
            for only in [*range(len(leaves)), None, None, None, None]
        ]
        directions = treedef.unflatten([np.stack(group) for group in zip(*directions, strict=True)])
        h = 1e-5

        @jax.jit
        @jax.vmap
        def difference(direction):
            plus, minus = (
                run(jax.tree.map(lambda p, d, h=h: p + h * d, phi, direction), recorded)[0]
                for h in (h, -h)
            )
            return (plus - minus) / (2 * h)

        slopes = sum(
            jnp.tensordot(d.reshape(len(d), -1), g.reshape(-1), 1)
            for d, g in zip(jax.tree.leaves(directions), jax.tree.leaves(gradient), strict=True)
        )
        np.testing.assert_allclose(slopes, difference(directions), rtol=1e-6, atol=1e-9)
        assert np.abs(slopes).min() > 1e-6


def test_recomputing_changes_memory_and_not_the_meta_gradient():
    # Without it, what a step stores is there as often as there are steps.
    # No unit of tanh is dead: no moment of Adam's is zero, where its root is steep.
    family = tiny_family(optimizees.mlp((3,), "tanh", 3))
    phi = random_meta_params(CONFIG.meta_optimizer)
    lane = jax.jit(functools.partial(new_lane, CONFIG, family))(phi, KEY)
    temporary, found = {}, {}
    for recompute in ("step", "nothing"):
        config = dataclasses.replace(
            CONFIG, truncation=16, horizon=(16, 16), recompute=recompute
        )  # fmt: skip
        run = functools.partial(run_truncation, config, family)
        program = jax.jit(jax.grad(run, has_aux=True)).lower(phi, lane).compile()
        temporary[recompute] = program.memory_analysis().temp_size_in_bytes
        found[recompute], _ = program(phi, lane)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), found["step"], found["nothing"]
    )
    assert max(float(abs(g).max()) for g in jax.tree.leaves(found["step"])) > 1e-3
    assert temporary["step"] < 0.7 * temporary["nothing"]
