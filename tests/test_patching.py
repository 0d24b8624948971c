"""Patching: whose parameters come back, how they were averaged, and whether it helps."""

import dataclasses
import warnings

import flax.linen as nn
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.tiny import compile_fast as compile_fast
from flax import nnx

import advmeta
from advmeta.optimizees import mlp
from advmeta.patching import CHECKS, SHRINK, with_average

KEY = jax.random.key(0)
BALL = advmeta.ThreatModel("linf", 0.1)
RNG = np.random.default_rng(0)
X = RNG.uniform(size=(60, 4)).astype(np.float32)
Y = X[:, :3].argmax(axis=1).astype(np.int32)
HELD_OUT = (X[:20], Y[:20])


def linear(params, x):
    return x @ params["w"]


def perfect():
    return {"w": 8 * jnp.eye(4)[:, :3]}


def patch(params=None, apply=linear, **options):
    options = {"threat_model": BALL, "key": KEY, "meta_optimizer": optax.sgd(0.1), "steps": 10,
               "batch_size": 8, "held_out": HELD_OUT, **options}  # fmt: skip
    return advmeta.patch(apply, perfect() if params is None else params, X, Y, **options)


def constant_steps(of):
    """An optimizer that ignores the gradient: its t-th update, from 0, is of(t) everywhere."""

    def update(gradient, count, params=None):
        return jax.tree.map(lambda g: jnp.full_like(g, of(count)), gradient), count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)


def test_the_average_weighs_late_parameters_more():
    """Unrolling the recursion, the weight of theta_t is t (t + 1) (t + 2) up to a factor."""
    optimizer = with_average(constant_steps(lambda t: (t + 1) ** 2))
    theta = {"w": jnp.zeros(2)}
    state, path = optimizer.init(theta), []
    for _ in range(7):
        updates, state = optimizer.update(theta, state, theta)
        theta = optax.apply_updates(theta, updates)
        path.append(theta["w"])
    t = np.arange(1, 8)
    expected = np.average(path, axis=0, weights=t * (t + 1) * (t + 2))
    np.testing.assert_allclose(state.average["w"], expected, rtol=1e-6)


def test_it_starts_from_shrunken_parameters_and_returns_their_average():
    patched, report = patch(meta_optimizer=optax.sgd(0.0))
    np.testing.assert_allclose(patched["w"], SHRINK * perfect()["w"], rtol=1e-5)
    assert report.distance == pytest.approx(1 - SHRINK, rel=1e-5)
    assert report.steps == report.gradient_evaluations == 10 and report.note == ""
    # Every logit is 0.7 of what it was: no prediction changes.
    assert report.before.clean == report.after.clean == 1.0


def test_the_drop_of_clean_accuracy_is_held():
    """Steps of +0.15 on one column: the model comes to predict one class, more and more often."""
    direction = jnp.zeros((4, 3)).at[:, 0].set(0.15)

    def update(gradient, state, params=None):
        return {"w": direction}, state

    spoil = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    _, free = patch(meta_optimizer=spoil)
    assert free.after.clean < 0.8 and free.steps == 10
    patched, held = patch(meta_optimizer=spoil, max_clean_drop=0.1)
    assert 0 < held.steps < 10 and held.after.clean >= held.before.clean - 0.1
    assert f"stopped after {held.steps} of 10 steps" in held.note
    assert "more than 0.1 of clean accuracy" in held.note
    # It is the average of a run of so many steps.
    shorter, _ = patch(meta_optimizer=spoil, steps=held.steps)
    np.testing.assert_allclose(patched["w"], shorter["w"], rtol=1e-6)
    _, one_more = patch(meta_optimizer=spoil, steps=held.steps + 1)
    assert one_more.after.clean < held.before.clean - 0.1


def test_parameters_that_are_not_finite_are_never_returned():
    nothing_good = constant_steps(lambda t: jnp.nan)
    patched, report = patch(meta_optimizer=nothing_good)
    np.testing.assert_array_equal(patched["w"], perfect()["w"])
    assert report.steps == 0 and "as they were given: all others were not finite" in report.note
    late = constant_steps(lambda t: jnp.where(t < 5, 0.0, jnp.inf))
    patched, report = patch(meta_optimizer=late)
    assert report.steps == 5 and jnp.isfinite(patched["w"]).all()


def test_what_is_no_floating_point_array_stays_as_it_is():
    def apply(params, x):
        return params["activation"](x @ params["w"]) * params["calls"]

    params = {**perfect(), "calls": jnp.int32(1), "activation": jax.nn.relu, "no": None}
    patched, _ = patch(params, apply)
    assert patched["activation"] is jax.nn.relu and patched["no"] is None
    assert patched["calls"] is params["calls"] and patched["w"].dtype == jnp.float32


def test_what_a_normalisation_counts_stays_as_it_is():
    def apply(params, x):
        mean, var = params["batch_stats"]["norm"]["mean"], params["norm"]["var"]
        return ((x - mean) / jnp.sqrt(var)) @ params["mean"]["w"]

    counted = {"batch_stats": {"norm": {"mean": jnp.ones(4) / 9}}, "norm": {"var": jnp.ones(4)}}
    params = {**counted, "mean": perfect()}  # a layer may be called so
    patched, _ = patch(params, apply)
    assert not np.array_equal(patched.pop("mean")["w"], perfect()["w"])
    jax.tree.map(np.testing.assert_array_equal, patched, counted)


@pytest.mark.parametrize("steps", [1, 19, 41, 61])
def test_a_number_of_steps_that_pieces_do_not_divide(steps):
    # What is finite for half of them is kept as it was at the last look before.
    stays = constant_steps(lambda t: jnp.where(t < steps // 2, 0.01, jnp.nan))
    _, all_good = patch(meta_optimizer=constant_steps(lambda t: 0.01), steps=steps)
    assert all_good.steps == all_good.gradient_evaluations == steps
    _, report = patch(meta_optimizer=stays, steps=steps)
    pieces = min(CHECKS, steps)
    last_good = [n for n in range(steps, 0, -(steps // pieces)) if n <= steps // 2]
    assert report.steps == max(last_good, default=0)


def test_a_fifth_is_held_out_where_nothing_else_is():
    order_matters, _ = patch(held_out=None)
    again, _ = patch(held_out=None)
    other, report = patch(held_out=None, key=jax.random.key(1))
    np.testing.assert_array_equal(order_matters["w"], again["w"])
    assert not np.array_equal(order_matters["w"], other["w"])
    assert (report.after.clean * 12) % 1 == pytest.approx(0, abs=1e-5)  # of 60 examples


def test_flax_linen_nnx_haiku_and_plain_dicts_get_the_same_patch():
    """One model, four libraries: layers (4 -> 6 -> 3), named in the same order."""
    init, apply = mlp((6,), num_classes=3)
    plain = init(KEY, (4,))
    (kernel, bias), (kernel_1, bias_1) = (
        (plain[f"layer_{i}"]["kernel"], plain[f"layer_{i}"]["bias"] + 0.01) for i in (0, 1)
    )
    plain = {"layer_0": {"kernel": kernel, "bias": bias},
             "layer_1": {"kernel": kernel_1, "bias": bias_1}}  # fmt: skip

    module = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
    linen = {"params": {"layers_0": plain["layer_0"], "layers_2": plain["layer_1"]}}

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer_0, self.layer_1 = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.layer_1(nnx.relu(self.layer_0(x)))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, plain)

    network = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP((6, 3))(x)))
    names = ("mlp/~/linear_0", "mlp/~/linear_1")
    haiku_params = {
        name: {"w": layer["kernel"], "b": layer["bias"]}
        for name, layer in zip(names, plain.values(), strict=True)
    }
    options = {"meta_optimizer": "mixture", "steps": 20}
    expected, report = patch(plain, apply, **options)
    assert report.note == "mixture was trained for 100 to 300 steps"
    for params, apply in (
        (linen, module.apply),
        (state, lambda state, x: nnx.merge(graph, state)(x)),
        (haiku_params, network.apply),
    ):
        patched, same_report = patch(params, apply, **options)
        assert jax.tree.structure(patched) == jax.tree.structure(params)
        shapes = {leaf.shape: leaf for leaf in jax.tree.leaves(patched)}
        for leaf in jax.tree.leaves(expected):
            np.testing.assert_allclose(shapes[leaf.shape], leaf, rtol=1e-5, atol=1e-6)
        assert same_report.after == report.after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": None}, "steps=None is for a pretrained meta-optimizer"),
        ({"max_clean_drop": -0.1}, "max_clean_drop=-0.1 must be at least 0"),
        ({"params": {"n": jnp.int32(3)}, "apply": lambda p, x: x[:, :3]}, "nothing to patch"),
        ({"threat_model": advmeta.ThreatModel("linf", jnp.ones(60))}, "patched for one epsilon"),
        ({"batch_size": 61}, "batch_size=61 must be between 1 and the training set's 60"),
        ({"meta_optimizer": "digits"}, "meta-optimizer 'digits' is unknown"),
        ({"apply": lambda p, x: (x @ p["w"])[0]}, "must give one row of logits an example"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        patch(**options)


def test_a_use_that_training_did_not_cover_is_noted():
    ball = dataclasses.replace(BALL, epsilon=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the note is enough
        _, report = patch(meta_optimizer="mixture", steps=301, threat_model=ball)
    balls = "l2 0.25 to 1, linf 0.005 to 0.02, linf 0.025 to 0.1, linf 0.05 to 0.2"
    assert f"mixture was trained for {balls} alone" in report.note
    assert "mixture was trained for 100 to 300 steps" in report.note


def adam_model(task):
    params, _ = advmeta.train(task, optax.adam(1e-2), KEY, steps=400)
    return params


@pytest.fixture(scope="module")
def digits():
    return advmeta.data.load("digits")


def examples(digits):
    index = jax.random.permutation(jax.random.key(50), len(digits.train.y))[:500]
    return digits.train.x[index], digits.train.y[index]


@pytest.mark.slow
def test_a_plainly_trained_model_becomes_more_robust(digits):
    """Over six models 0.305 -> 0.678 robust and 0.965 -> 0.945 clean; this one 0.695 and 0.934."""
    task = advmeta.Task(digits.train, digits.test, BALL, mlp((20,)))
    params = adam_model(task)
    patched, report = advmeta.patch(
        task.optimizee.apply, params, *examples(digits), threat_model=BALL, held_out=digits.test,
        key=KEY,
    )  # fmt: skip
    assert report.before.robust < 0.45
    assert report.after.robust > 0.58 and report.after.clean > report.before.clean - 0.04
    # The report is of the parameters that came back.
    accuracy = advmeta.held_out_accuracy(task, patched, jax.random.key(9))
    assert accuracy.clean == pytest.approx(report.after.clean, abs=1e-6)
    assert accuracy.robust == pytest.approx(report.after.robust, abs=0.02)


@pytest.mark.slow
def test_an_equinox_module_becomes_more_robust(digits):
    """Its weights are (outputs, inputs), the other way round than what the LSTM was trained on."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(64, 10, 20, 1, key=KEY)

    def apply(model, x):
        return jax.vmap(model)(x.reshape(len(x), -1))

    trainable, static = eqx.partition(model, eqx.is_inexact_array)
    task = advmeta.Task(
        digits.train, digits.test, BALL,
        advmeta.Optimizee(lambda key, shape: trainable,
                          lambda p, x: apply(eqx.combine(p, static), x)),
    )  # fmt: skip
    model = eqx.combine(adam_model(task), static)
    patched, report = advmeta.patch(
        apply, model, *examples(digits), threat_model=BALL, held_out=digits.test, key=KEY
    )
    print(report)
    assert isinstance(patched, eqx.nn.MLP) and patched.activation is model.activation
    assert report.before.robust < 0.45 and report.after.robust > report.before.robust + 0.15
