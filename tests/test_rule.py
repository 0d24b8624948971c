"""The nominal rule and what bounds it, beside what optax makes of the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.steps import (
    GRADIENTS_T,
    PARAMS_T,
    STEPS,
    assert_close,
    compile_update,
    loop,
)
from fixtures.tiny import compile_fast as compile_fast
from fixtures.tiny import random_meta_params

from advmeta.meta_optimizer import (
    DEFAULT_FEATURES,
    Aim,
    MetaOptimizerConfig,
    inputs,
    jacobian,
    scale_by_meta_optimizer,
)
from advmeta.meta_optimizer.layers import layer_positions

WITHOUT_REACH = tuple(name for name in DEFAULT_FEATURES if name != "reach")


@pytest.mark.parametrize(
    ("seen", "horizon", "paces"),
    [
        (DEFAULT_FEATURES[:5], 8, [1, 1, 1, 1]),  # which is not told the time
        # A third, warmed up over 40 steps.
        (WITHOUT_REACH, None, [1 / 120, 2 / 120, 3 / 120, 4 / 120]),
        # sin^2(pi/2 (1 - t/2)) = 1, 1/2, 0, and nothing after the horizon.
        (WITHOUT_REACH, 2, [1, 0.5, 0, 0]),
    ],
)
def test_a_readout_of_zero_is_adam_with_the_pull(seen, horizon, paces):
    # tanh 0 = 0 and exp 0 = 1: u = -eta_t (m_hat / (sqrt(v_hat) + eps) + nu rms / (rms + 4 eta) n),
    # of the gradient g + mu theta, without the last term where the leaf has one axis or none.
    config = MetaOptimizerConfig((2,), seen, 0.02, regularisation=0.4, pull=0.3, adaptivity=0.5)
    meta_params = nominal(random_meta_params(config))
    ours = compile_update(scale_by_meta_optimizer(meta_params, config, Aim(horizon=horizon)))

    def pulled(theta):
        if np.ndim(theta) < 2:
            return 0.0
        rms = np.sqrt(np.mean(np.square(theta)) + 1e-6)
        _, (direction,) = jacobian.gain_and_pull([theta], layer_positions([theta]))
        return 0.02 * 0.3 * rms / (rms + 4 * 0.02) * direction

    adam = optax.chain(l2_regularised(0.4), optax.adam(0.02))

    def update(gradient, state, params):
        updates, state = adam.update(gradient, state, params)
        return jax.tree.map(lambda u, p: u - pulled(p), updates, params), state

    expected = optax.GradientTransformation(adam.init, update)
    expected = [
        jax.tree.map(lambda u, p=pace: p * u, updates)
        for pace, updates in zip(paces, loop(expected)[0], strict=True)
    ]
    assert_close(loop(ours)[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5])
def test_coordinates_share_a_part_of_the_root(p):
    # After one step m_hat = g and v_hat = g^2: d = g / (|g|^2p mean(g^2)^(1/2 - p)).
    config = MetaOptimizerConfig((2,), ("adam",), 0.02, regularisation=0.0, adaptivity=p)
    ours = scale_by_meta_optimizer(nominal(random_meta_params(config)), config)
    gradient = {"w": jnp.array([[0.1, -0.2], [0.5, 2.0]]), "b": jnp.array([3.0, 0.0])}
    updates, _ = ours.update(gradient, ours.init(gradient), gradient)

    def expected(g):
        sign, size, mean = np.sign(g), np.abs(np.asarray(g, np.float64)), np.mean(g**2)
        return -0.02 * sign * size ** (1 - 2 * p) / mean ** (0.5 - p)

    assert_close(updates, jax.tree.map(expected, gradient), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("size", [1e-6, 1e-13, 0.0])
def test_weights_that_vanish_have_a_moderate_derivative(size):
    # Those of a pixel that is always dark have L2 for a gradient, and go to zero by it. It was
    # 35,000 there, which overflows after some steps of backpropagation.
    config = MetaOptimizerConfig((2,), ("adam",), regularisation=0.01)
    ours = scale_by_meta_optimizer(nominal(random_meta_params(config)), config)
    gradient = {"w": jnp.array([[0.1, -0.2], [0.0, 0.0]])}
    params = {"w": jnp.array([[1.0, 1.0], [size, -size]])}

    def moved(params):
        return ours.update(gradient, ours.init(params), params)[0]["w"].sum()

    assert abs(jax.grad(moved)(params)["w"]).max() < 10


def l2_regularised(mu, factor=1.0):
    """Adds factor min(mu, 0.3 rms(g) / rms(theta)) theta to the gradients."""

    def add(g, theta):
        share = 0.3 * jnp.sqrt(jnp.mean(g**2)) / jnp.sqrt(jnp.mean(theta**2) + 1e-6)
        return g + factor * jnp.minimum(mu, share) * theta

    return optax.stateless(lambda gradients, params: jax.tree.map(add, gradients, params))


@pytest.mark.parametrize("mu", [1e-3, 1e3])
def test_regularisation_cannot_outweigh_the_gradient(mu):
    # Gradients 1,000 times smaller than their parameters, as early in a deep model: L2 is mu theta
    # up to 0.3 of the gradient, and Adam goes where the gradient says.
    config = MetaOptimizerConfig((2,), ("adam",), 0.02, regularisation=mu, adaptivity=0.5)
    meta_params = nominal(random_meta_params(config))
    ours = compile_update(scale_by_meta_optimizer(meta_params, config))
    gradient = {"w": jnp.full((2, 2), 1e-3).at[0, 0].set(-1e-3)}
    params = {"w": jnp.ones((2, 2)).at[1, 1].set(-1.0)}
    update, _ = ours.update(gradient, ours.init(params), params)
    np.testing.assert_array_equal(jnp.sign(update["w"]), -jnp.sign(gradient["w"]))
    expected, _ = loop(optax.chain(l2_regularised(mu), optax.adam(0.02)))
    assert_close(loop(ours)[0], expected, rtol=1e-5, atol=1e-7)


def test_a_model_that_normalises_is_regularised_and_pulled_a_tenth():
    plain, scaled = (
        tuple({"kernel": tree["layer_0"]["kernel"], **more} for tree in (GRADIENTS_T, PARAMS_T))
        for more in ({}, {"scale": np.ones((STEPS, 2), np.float32)})
    )

    def run(trees, **constants):
        config = MetaOptimizerConfig((2,), ("adam", "jacobian"), 0.02, **constants)
        meta_params = nominal(random_meta_params(config))
        updates, _ = loop(compile_update(scale_by_meta_optimizer(meta_params, config)), *trees)
        return [update["kernel"] for update in updates]

    whole, tenth = {"regularisation": 0.1, "pull": 0.5}, {"regularisation": 0.01, "pull": 0.05}
    assert_close(run(scaled, **whole), run(plain, **tenth))
    assert float(jnp.abs(run(plain, **whole)[0] - run(plain, **tenth)[0]).max()) > 1e-3


def test_what_regularises_grows_with_how_far_the_adversary_moves_the_logits():
    # r = epsilon mean_e |J_e|_1, and r / (1 + r) of mu and nu. With one output J is the kernel.
    plain = ("adam", "jacobian")
    kernel, gradient = {"w": jnp.array([[2.0], [-1.0], [0.5]])}, {"w": jnp.ones((3, 1))}
    gain, _ = jacobian.gain_and_pull([kernel["w"]], layer_positions([kernel["w"]]))
    assert float(gain) == pytest.approx(3.5, rel=0.01)  # softened

    def update(seen, aim=Aim(), **constants):
        config = MetaOptimizerConfig((2,), seen, 0.02, **constants)
        ours = scale_by_meta_optimizer(nominal(random_meta_params(config)), config, aim)
        return ours.update(gradient, ours.init(kernel), kernel)[0]

    for epsilon in (1e-3, 0.1, 30.0):
        share = epsilon * float(gain) / (1 + epsilon * float(gain))
        found = update((*plain, "reach"), Aim(epsilon), regularisation=0.1, pull=0.5)
        assert_close(found, update(plain, regularisation=0.1 * share, pull=0.5 * share))
    unlike = update(plain, regularisation=0.1, pull=0.5)["w"] - update(plain)["w"]
    assert float(jnp.abs(unlike).max()) > 1e-4


@pytest.mark.parametrize(
    "params", [{"scale": jnp.ones(2), "w": jnp.ones((3, 2))}, {"b": jnp.ones(3)}]
)
def test_the_reach_is_one_where_it_is_not_known(params):
    # Of a model that normalises, and of one without a kernel.
    leaves = jax.tree.leaves(params)
    positions = layer_positions(params)
    reach, _ = inputs.look_at_jacobian(DEFAULT_FEATURES, Aim(0.3), leaves, positions)
    assert float(reach) == 1


def test_a_layer_without_outputs_is_no_part_of_the_chain():
    config = MetaOptimizerConfig((2,))
    ours = scale_by_meta_optimizer(random_meta_params(config), config)
    kernel, empty = np.ones((3, 2), np.float32), np.ones((3, 0), np.float32)

    def update(params):
        return ours.update(params, ours.init(params), params)[0]

    updates = update({"layer_0": kernel, "layer_1": empty})
    assert updates["layer_1"].shape == (3, 0)
    assert np.isfinite(updates["layer_0"]).all()


def nominal(meta_params):
    """The same without what the readout and the linear map add."""
    zeros = jax.tree.map(np.zeros_like, meta_params)
    lstm = {**meta_params["lstm"], "readout": zeros["lstm"]["readout"]}
    return {**zeros, "lstm": lstm}


def test_the_linear_map_is_a_factor_of_each_part():
    # The only layer is the first, and of this feature 6 V s is six times its row of V: Adam times
    # exp(2 tanh a) of the gradient with exp(2 tanh m) times the regularisation.
    config = MetaOptimizerConfig(
        (2,), ("adam", "layer"), 0.02, regularisation=0.4, shift=0.5, adaptivity=0.5
    )
    meta_params = nominal(random_meta_params(config))
    is_first, (a, m), b = 0, (0.3, 0.7), -0.2
    meta_params["linear"]["shared_0"]["kernel"][is_first] = (a / 6, m / 6)
    meta_params["lstm"]["readout"]["bias"][:] = (0, b)  # the shift is the readout's alone
    ours = compile_update(scale_by_meta_optimizer(meta_params, config))
    adam = optax.chain(l2_regularised(0.4, np.exp(2 * np.tanh(m))), optax.adam(1.0))
    expected = [
        jax.tree.map(lambda u: 0.02 * (np.exp(2 * np.tanh(a)) * u + 0.5 * np.tanh(b)), updates)
        for updates in loop(adam)[0]
    ]
    assert_close(loop(ours)[0], expected, rtol=1e-4, atol=1e-6)


def test_updates_are_bounded_whatever_the_meta_params():
    # |tanh| <= 1: |u| <= eta (shift + e^2 |direction| + e^2 nu |n|); with "log_sign" alone that is
    # eta * shift.
    config = MetaOptimizerConfig((2,), ("log_sign",))
    meta_params = random_meta_params(config, scale=1e3)
    optimizer = compile_update(scale_by_meta_optimizer(meta_params, config))
    updates, _ = loop(optimizer, jax.tree.map(lambda g: 1e6 * g, GRADIENTS_T))
    largest = max(float(jnp.abs(u).max()) for u in jax.tree.leaves(updates))
    assert largest <= config.learning_rate * config.shift * (1 + 1e-6)
    assert largest > 0.9 * config.learning_rate * config.shift


def test_unknown_feature_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"\['colour'\] cannot be used.*'log_sign', 'adam', "
                                         r"'parameter', 'jacobian', 'layer'"):  # fmt: skip
        MetaOptimizerConfig(features=("adam", "colour"))
    with pytest.raises(ValueError, match="there must be at least one"):
        MetaOptimizerConfig(features=())


@pytest.mark.parametrize("hidden", [(), (20, 0)])
def test_hidden_units_must_be_positive(hidden):
    with pytest.raises(ValueError, match="units of one layer or more"):
        MetaOptimizerConfig(hidden=hidden)


def test_unknown_memory_dtypes():
    with pytest.raises(ValueError, match=r"memory_dtype='int8' is .*'float32' or 'bfloat16'"):
        MetaOptimizerConfig(memory_dtype="int8")


@pytest.mark.parametrize("adaptivity", [-0.1, 0.6])
def test_an_adaptivity_beyond_adam_is_refused(adaptivity):
    with pytest.raises(ValueError, match="must lie between 0"):
        MetaOptimizerConfig(adaptivity=adaptivity)
