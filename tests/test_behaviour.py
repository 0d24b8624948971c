"""What an optimizer is seen to do, where it is known; and pairs of images."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import advmeta
from advmeta.evaluation.behaviour import behaviour
from advmeta.evaluation.curves import learning_steps
from advmeta.evaluation.twins import twins

DIGITS = advmeta.data.load("digits", train_examples=100)
TASK = advmeta.Task(
    DIGITS.train,
    DIGITS.test,
    advmeta.ThreatModel("linf", 0.2),
    advmeta.optimizees.mlp((8,)),
    batch_size=32,
)


def decay(rate: float) -> optax.GradientTransformation:
    """u = -rate w, whatever the gradient."""
    return optax.stateless(lambda g, params: jax.tree.map(lambda w: -rate * w, params))


def test_what_is_seen_is_what_was_done():
    """Of u = -0.01 sign g the part down the gradient is 0.01; u = -0.1 w has the effective step 0.1
    and is -0.1 rms(w) times w / rms(w), so its sign is against that of w."""
    optimizers = {"sign": optax.sign_sgd(0.01), "decay": decay(0.1)}
    seen = behaviour(TASK, optimizers, jax.random.key(0), steps=43)
    sign, _ = seen["against_gradient"]
    for quartile in ("low", "median", "high"):
        np.testing.assert_allclose(sign[quartile], 0.01, rtol=1e-4)
    assert (np.diff(sign["x"]) > 0).all() and sign["x"][0] > 0
    _, shrunk = seen["against_parameter"]
    x = np.array(shrunk["x"])
    assert (np.sign(shrunk["median"]) == -np.sign(x))[np.abs(x) > 0.1].all()
    steps = {(line["optimizer"], line["layer"]): line for line in seen["effective_step"]}
    assert set(steps) == {(name, f"layer_{i}/kernel") for name in optimizers for i in (0, 1)}
    for layer in ("layer_0/kernel", "layer_1/kernel"):
        np.testing.assert_allclose(steps["decay", layer]["share"], 0.1, rtol=1e-4)
        assert steps["decay", layer]["steps"] == learning_steps(43)


def test_only_the_first_optimizer_trains():
    """The same weights, so the same gradients, whoever looks on; alone or not."""
    key = jax.random.key(0)
    alone = behaviour(TASK, {"sgd": optax.sgd(0.1)}, key, steps=10)
    watched = behaviour(TASK, {"sgd": optax.sgd(0.1), "decay": decay(0.5)}, key, steps=10)
    for kind, curves in alone.items():
        np.testing.assert_equal(curves, [c for c in watched[kind] if c["optimizer"] == "sgd"])


def test_a_weight_without_a_gradient_has_no_part_in_the_first_curve():
    """The second of two inputs is always zero: so is the gradient of half of the weights. With the
    others of equal size, every |g| / rms(g) is sqrt(2)."""
    x = np.tile(np.array([[1.0, 0.0]], np.float32), (8, 1))
    batch = advmeta.Batch(x, np.zeros(8, np.int32))
    init = lambda key, x_shape: {"layer": {"kernel": jnp.ones((2, 2))}}  # noqa: E731
    optimizee = advmeta.Optimizee(init, lambda params, x: x @ params["layer"]["kernel"])
    task = advmeta.Task(batch, batch, advmeta.ThreatModel(), optimizee, batch_size=4)
    seen = behaviour(task, {"sgd": optax.sgd(0.1)}, jax.random.key(0), steps=1)
    np.testing.assert_allclose(seen["against_gradient"][0]["x"], 2**0.5, rtol=1e-4)


def test_twins_are_the_first_that_were_right_and_are_broken():
    """Labels are signs of x - 0.5 for one pixel; within 0.2 of 0.5 the sign can be flipped."""
    x = np.array([0.9, 0.6, 0.4, 0.1, 0.45], np.float32).reshape(-1, 1, 1, 1)
    y = np.array([1, 1, 0, 0, 1])  # the last is wrong as it is
    batch = advmeta.Batch(jnp.asarray(x), jnp.asarray(y))

    def apply(params, x):
        return jnp.stack([0 * x.ravel(), params * (x.ravel() - 0.5)], axis=1)

    threat_model = advmeta.ThreatModel("linf", 0.2)
    task = advmeta.Task(batch, batch, threat_model, advmeta.Optimizee(None, apply), 1)
    found = twins(task, 10.0, jax.random.key(0))
    assert found["label"] == [1, 0] and found["prediction"] == [0, 1]
    np.testing.assert_allclose(np.ravel(found["x"]), [0.6, 0.4], atol=1e-3)
    np.testing.assert_allclose(np.ravel(found["x_adv"]), [0.4, 0.6], atol=0.05)
