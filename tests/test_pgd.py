import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import linear, linear_problem
from fixtures.tiny import compile_fast as compile_fast
from jax.tree_util import Partial

import advmeta
from advmeta.attacks import fgsm, pgd
from advmeta.attacks.losses import cross_entropy, margin
from advmeta.attacks.projected_gradient import ascend

KEY = jax.random.key(0)
NORMS = ["linf", "l2"]


@functools.cache
def two_classes(norm):
    """A linear model, examples, labels and their distances to the one boundary there is."""
    params, x, y, distance = linear_problem(norm, n=16, d=6, classes=2)
    return Partial(linear, params), x, y, distance


@functools.cache
def bent():
    """A random network of one hidden layer: its loss has more than one summit in a ball."""
    rng = np.random.default_rng(3)
    inner, outer = (rng.normal(size=s).astype(np.float32) for s in ((6, 12), (12, 3)))

    def apply(weights, x):
        return jnp.sin(4 * x @ weights[0]) @ weights[1]

    x = rng.uniform(0.2, 0.8, size=(16, 6)).astype(np.float32)
    logits_fn = Partial(apply, (inner, outer))
    return logits_fn, x, logits_fn(x).argmax(axis=1)


@pytest.mark.parametrize("norm", NORMS)
def test_breaks_those_whose_distance_is_below_epsilon(norm):
    # Cross-entropy grows straight towards the other class, so PGD gets to the farthest point of the
    # ball in that direction: it breaks an example exactly where the distance is below epsilon.
    logits_fn, x, y, distance = two_classes(norm)
    epsilon = float(np.median(distance))  # between the two in the middle
    assert min(abs(distance - epsilon)) > 1e-5
    threat_model = advmeta.ThreatModel(norm, epsilon)
    result = pgd(logits_fn, x, y, threat_model=threat_model, key=KEY, steps=20, x_init=x)
    np.testing.assert_array_equal(result.is_adversarial, distance < epsilon)
    np.testing.assert_array_equal(result.is_adversarial, logits_fn(result.x_adv).argmax(1) != y)
    assert (threat_model.distance(x, result.x_adv) <= epsilon * (1 + 1e-5)).all()


def test_the_history_of_a_linear_loss_is_a_straight_line():
    # Each step of length s raises the margin by s ||w_1 - w_0||_1, and the bounds do not bind;
    # after 4 steps the path is at epsilon = 4 s and stays there.
    logits_fn, x, y, distance = two_classes("linf")
    s, weight = 0.001, np.asarray(logits_fn.args[0]["weight"])
    result, history = ascend(
        logits_fn, x, y, advmeta.ThreatModel("linf", 4 * s), KEY, s, x,
        steps=6, restarts=1, targeted=False, loss=margin,
    )  # fmt: skip
    reach = s * np.minimum(np.arange(7), 4)[:, None]
    expected = (reach - distance) * np.abs(weight[:, 1] - weight[:, 0]).sum()
    np.testing.assert_allclose(history.loss[0], expected, atol=1e-5)
    np.testing.assert_array_equal(history.is_adversarial[0], history.loss[0] > 0)
    np.testing.assert_array_equal(result.loss, history.loss[0].max(axis=0))


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_find_the_same(norm):
    # From elsewhere in the l2 ball the path only nears the farthest point: 2 % are left for that.
    logits_fn, x, y, distance = two_classes(norm)
    epsilon = float(np.median(distance))
    result = pgd(logits_fn, x, y, threat_model=advmeta.ThreatModel(norm, epsilon), key=KEY)
    clear = abs(distance / epsilon - 1) > 0.02
    assert clear.sum() >= 12
    np.testing.assert_array_equal(result.is_adversarial[clear], (distance < epsilon)[clear])


def test_targeted_reaches_the_label_given():
    # With two classes the target is the other one, and the same examples come across.
    logits_fn, x, y, distance = two_classes("linf")
    epsilon = float(np.median(distance))
    result = pgd(
        logits_fn, x, 1 - y, threat_model=advmeta.ThreatModel("linf", epsilon), key=KEY, steps=20,
        x_init=x, targeted=True,
    )  # fmt: skip
    np.testing.assert_array_equal(result.is_adversarial, distance < epsilon)
    np.testing.assert_allclose(
        result.loss, cross_entropy(logits_fn(result.x_adv), 1 - y), rtol=1e-4, atol=1e-6
    )
    assert (result.loss < cross_entropy(logits_fn(x), 1 - y)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_an_epsilon_an_example_is_a_loop_of_scalars(norm):
    logits_fn, x, y = bent()
    epsilon = np.linspace(0, 0.2, 16).astype(np.float32)
    attack = functools.partial(pgd, logits_fn, key=KEY, steps=5)
    together = attack(x, y, threat_model=advmeta.ThreatModel(norm, epsilon))
    for i in range(0, 16, 5):
        scalar = advmeta.ThreatModel(norm, epsilon[i])
        alone = attack(x[i : i + 1], y[i : i + 1], threat_model=scalar)
        np.testing.assert_allclose(together.x_adv[i], alone.x_adv[0], atol=2e-5)
    np.testing.assert_array_equal(together.x_adv[0], x[0])


def test_the_order_and_the_batch_do_not_matter():
    logits_fn, x, y = bent()
    attack = functools.partial(
        pgd, logits_fn, threat_model=advmeta.ThreatModel("linf", 0.05), key=KEY, steps=5, restarts=2
    )
    whole, order = attack(x, y), np.random.default_rng(0).permutation(16)
    shuffled = attack(x[order], y[order])
    np.testing.assert_allclose(shuffled.x_adv, whole.x_adv[order], atol=1e-6)
    first = attack(x[:8], y[:8])
    np.testing.assert_allclose(first.x_adv, whole.x_adv[:8], atol=1e-6)
    other = attack(x, y, key=jax.random.key(1))
    assert abs(other.x_adv - whole.x_adv).max() > 1e-3


def test_the_best_point_of_the_path_is_returned():
    # Steps of ten times epsilon throw the path about; what comes back is never weaker than the
    # start, and its loss is the loss there.
    logits_fn, x, y = bent()
    threat_model = advmeta.ThreatModel("l2", 0.1)
    start = threat_model.project(x + 0.02, x)
    result = pgd(
        logits_fn, x, y, threat_model=threat_model, key=KEY, steps=7, step_size=1.0, x_init=start
    )
    at_start = cross_entropy(logits_fn(start), y)
    fooled_at_start = logits_fn(start).argmax(axis=1) != y
    stays = result.is_adversarial == fooled_at_start
    assert (result.is_adversarial | ~fooled_at_start).all()
    assert (result.loss >= at_start - 1e-5)[stays].all()
    loss = cross_entropy(logits_fn(result.x_adv), y)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-4, atol=1e-5)


def test_restarts_find_the_other_summit():
    # The margin |d| + 0.2 d - 0.4 of d = x - 0.5 is climbed to either side of 0: at d = 0.4 it is
    # 0.08, which breaks the example, at d = -0.4 it is -0.08. One start in two is right.
    def logits_fn(x):
        d = x[:, 0] - 0.5
        return jnp.stack([jnp.zeros_like(d), 20 * (jnp.abs(d) + 0.2 * d - 0.4)], axis=1)

    x = 0.5 + np.arange(64, dtype=np.float32)[:, None] * 1e-6
    attack = functools.partial(
        pgd, logits_fn, x, np.zeros(64, int), threat_model=advmeta.ThreatModel("linf", 0.4),
        key=KEY, steps=10,
    )  # fmt: skip
    # Of 64 examples 32 +- 4; all of them after 20 restarts, but for one case in 16,000.
    assert 12 < attack(restarts=1).is_adversarial.sum() < 52
    assert attack(restarts=20).is_adversarial.all()


def test_any_loss():
    # Raising minus the cross-entropy is lowering it: nothing is broken, and the loss says so.
    logits_fn, x, y, _ = two_classes("linf")

    def kind(logits, y):
        return -cross_entropy(logits, y)

    result = pgd(
        logits_fn, x, y, threat_model=advmeta.ThreatModel(epsilon=0.05), key=KEY, steps=5,
        loss=kind, x_init=x,
    )  # fmt: skip
    assert not result.is_adversarial.any()
    assert (result.loss > kind(logits_fn(x), y)).all()


def test_bounds_hold():
    def logits_fn(x):
        return jnp.stack([-x.sum(axis=1), x.sum(axis=1)], axis=1)

    x = jnp.array([[0.0, 0.98, 1.0]])
    result = fgsm(logits_fn, x, jnp.array([0]), threat_model=advmeta.ThreatModel("linf", 0.1))
    np.testing.assert_allclose(result.x_adv, [[0.1, 1.0, 1.0]], atol=1e-7)


def test_fgsm_is_one_step_of_epsilon():
    # With weights (3, 4) the l2 step is 0.1 * (3, 4) / 5 against class 0.
    def logits_fn(x):
        return jnp.stack([-x @ jnp.array([3.0, 4.0]), jnp.zeros(len(x))], axis=1)

    x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    l2 = fgsm(logits_fn, x, y, threat_model=advmeta.ThreatModel("l2", 0.1))
    np.testing.assert_allclose(l2.x_adv, [[0.56, 0.58]], atol=1e-6)
    linf = fgsm(logits_fn, x, y, threat_model=advmeta.ThreatModel("linf", 0.1), key=KEY)
    np.testing.assert_allclose(linf.x_adv, [[0.6, 0.6]], atol=1e-6)


def test_new_parameters_are_not_a_new_compilation():
    _, x, y, _ = two_classes("linf")
    traces = []

    def model(w, x):
        traces.append(1)
        return x[:, :2] * w

    attack = functools.partial(pgd, threat_model=advmeta.ThreatModel(), key=KEY, steps=2)
    attack(Partial(model, jnp.ones(2)), x, y)
    checks = len(traces)  # tracing the attack, and looking at the shape of the logits
    attack(Partial(model, 2 * jnp.ones(2)), x, y)
    assert len(traces) - checks <= 1 < checks


X, Y = np.full((4, 3), 0.5, np.float32), np.array([0, 1, 2, 0])
BAD = {
    "length": (dict(y=Y[:3]), r"x has 4 examples but labels have shape \(3,\)"),
    "one-hot": (dict(y=np.eye(3, dtype=int)[Y]), r"labels have shape \(4, 3\)"),
    "floating": (dict(y=Y.astype(np.float32)), "labels have dtype float32.*astype"),
    "too large": (dict(y=Y + 1), r"labels lie in \[1, 3\] but the model has 3 classes, 0 to 2"),
    "negative": (dict(y=Y - 1), r"labels lie in \[-1, 1\]"),
    "not divided by 255": (dict(x=255 * X), r"outside the threat model's bounds \(0.0, 1.0\)"),
    "below": (dict(x=X - 1), "outside the threat model's bounds"),
    "nan": (dict(x=np.where(np.arange(4)[:, None] == 2, np.nan, X)), "1 examples with NaN"),
    "infinite": (dict(x=np.where(X > 0, np.inf, X)), "outside the threat model's bounds"),
    "one image": (dict(x=X[0]), r"it must be a batch \[n, ...\].*x\[None\]"),
    "no image": (dict(x=X[:0], y=Y[:0]), "at least one example"),
    "epsilon": (
        dict(threat_model=advmeta.ThreatModel(epsilon=np.ones(3))),
        r"epsilon has shape \(3,\); it must be one number, or one an example: shape \(4,\)",
    ),
    "no logits": (dict(logits_fn=lambda x: x.sum(axis=1)), r"must give one row of logits"),
    "steps": (dict(steps=0), "steps=0 and restarts=1 must both be at least 1"),
    "restarts": (dict(restarts=0), "restarts=0 must both be at least 1"),
    "start": (dict(x_init=X[:2]), r"x_init has shape \(2, 3\); it must be x's, \(4, 3\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, message = BAD[case]
    good = dict(
        logits_fn=lambda x: x, x=X, y=Y, threat_model=advmeta.ThreatModel(), key=KEY, steps=2
    )
    with pytest.raises(ValueError, match=message):
        pgd(**good | changes)
