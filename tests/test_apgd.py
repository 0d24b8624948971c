import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import SETTINGS, linear, linear_problem, load_images, load_model, load_reference
from jax.tree_util import Partial

import advmeta
from advmeta.attacks import apgd, auto_pgd, sparse_auto_pgd
from advmeta.attacks.auto_pgd import checkpoints, random_start
from advmeta.attacks.runs import Evaluation
from advmeta.attacks.sparse_auto_pgd import phases

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
        (50, [11, 21, 30, 38, 45]),
        (20, [4, 7, 9, *range(10, 21)]),
    ],
)
def test_checkpoints_are_those_of_the_reference(steps, expected):
    is_checkpoint, window = checkpoints(steps)
    found = np.flatnonzero(is_checkpoint)
    # The reference's last window of 50 steps is 3 long: 48 is one too.
    assert found.tolist()[: len(expected)] == expected
    np.testing.assert_array_equal(window[found], np.diff(found, prepend=0))


def state_and_evaluation(loss):
    x, n = jnp.zeros([3, 2]), 3
    loss = jnp.array(loss)
    state = auto_pgd._State(
        x, x, jnp.ones([3, 1]), x, jnp.full(n, -jnp.inf), x, x, jnp.zeros(n, bool), jnp.zeros(n),
        jnp.zeros(n, jnp.int32), jnp.full(n, -jnp.inf), jnp.ones(n, bool),
    )  # fmt: skip
    return state, Evaluation(loss, x, jnp.zeros(n, bool))


def test_the_first_step_is_compared_with_zero_and_later_ones_with_the_one_before():
    state, at = state_and_evaluation([5.0, -2.0, 5.0])
    state = auto_pgd._record(state, at, True)
    assert not state.increases.any()
    state = auto_pgd._record(state, at._replace(loss=jnp.array([3.0, -1.0, 6.0])), False)
    assert state.increases.tolist() == [1, 0, 1]  # 3 > 0, -1 < 0
    state = auto_pgd._record(state, at._replace(loss=jnp.array([2.0, 1.0, 7.0])), False)
    assert state.increases.tolist() == [1, 1, 2]
    assert state.best_loss.tolist() == [5.0, 1.0, 7.0]
    assert state.checkpoint_loss.tolist() == [5.0, -2.0, 5.0]  # of the start, the first "check"


def test_a_checkpoint_halves_the_step_at_most_at_the_threshold_and_when_standing_still():
    state, at = state_and_evaluation([1.0, 1.0, 1.0])
    state = state._replace(increases=jnp.array([12, 13, 11]), best_loss=jnp.full(3, 4.0))
    none, *_ = auto_pgd._checkpoint(state, at, False, 12.0)
    assert none.step_size.ravel().tolist() == [1.0, 1.0, 1.0]
    # 12 of 16 at rho = 0.75: the paper's "less than" would let the first example go on.
    first, *_ = auto_pgd._checkpoint(state, at, True, 12.0)
    assert first.step_size.ravel().tolist() == [0.5, 1.0, 0.5]
    # All have steps enough now, and no better loss: halved unless it was at the last checkpoint.
    first = first._replace(increases=jnp.array([16, 16, 16]))
    second, *_ = auto_pgd._checkpoint(first, at, True, 12.0)
    assert second.step_size.ravel().tolist() == [0.5, 0.5, 0.5]


def test_the_phases_of_l1_are_those_of_the_reference():
    factor, is_start, is_checkpoint = phases(100)
    # The first two have one step less: their starts are among the 101 evaluations.
    assert np.asarray(factor).tolist() == 30 * [3] + 30 * [2] + 41 * [1]
    assert np.flatnonzero(is_start).tolist() == [0, 30, 60]
    np.testing.assert_array_equal(is_checkpoint, ~is_start)  # 0.04 of 40 steps is 1
    # Of 1,000 steps, 400 are in the last phase, with a checkpoint every 16; 12 in the first.
    _, is_start, is_checkpoint = phases(1000)
    assert np.flatnonzero(is_start).tolist() == [0, 300, 600]
    assert np.flatnonzero(is_checkpoint)[:2].tolist() == [12, 24]
    assert np.flatnonzero(is_checkpoint)[-2:].tolist() == [984, 1000]
    assert phases(1).factor.tolist() == [1, 1]  # a start and a step, at epsilon


def test_a_checkpoint_of_l1_goes_back_where_the_best_point_has_become_sparser():
    x, moved = jnp.zeros([3, 20]), jnp.ones([3, 20])
    best = jnp.ones([3, 20]).at[:, 18:].set(0.0)  # 18 entries
    state = sparse_auto_pgd._State(
        moved, best, jnp.zeros(3), 2 * moved, x, jnp.zeros(3, bool), jnp.array([0.5, 0.5, 0.1]),
        jnp.array([19.0, 18.0, 18.0]),
    )  # fmt: skip
    at = Evaluation(jnp.zeros(3), moved, jnp.zeros(3, bool))
    state, x_now, gradient = sparse_auto_pgd._checkpoint(state, at, True, x)
    # 18 < 0.95 * 19 = 18.05: a full step from the best point. Else 0.5 / 1.5, and not below 0.1.
    np.testing.assert_allclose(state.step_size, [1.0, 1 / 3, 0.1], rtol=1e-6)
    assert state.entries.tolist() == [18.0, 18.0, 18.0]
    np.testing.assert_array_equal(x_now, [best[0], moved[1], moved[2]])
    np.testing.assert_array_equal(gradient[:, 0], [2.0, 1.0, 1.0])


def conformance(setting, loss, n, rank=None):
    """Compares flags and best losses, an example, with those of the reference."""
    name, norm, epsilon = SETTINGS[setting]
    x, y = load_images()
    reference = load_reference(setting)
    result = apgd(
        Partial(*load_model(name)), x[:n], y[:n], threat_model=advmeta.ThreatModel(norm, epsilon),
        key=KEY, loss=loss, x_init=reference["x_init"][:n],
        target_ranks=None if rank is None else [rank],
    )  # fmt: skip
    kind = f"apgd_{loss}" if rank is None else "apgd_t"
    row = ... if rank is None else rank - 2
    robust, loss = reference[f"{kind}_robust"][row], reference[f"{kind}_loss"][row]
    assert np.mean(~result.is_adversarial == robust[:n]) >= 0.99
    # Of the mean size: the targeted losses have both signs, and of one rank a mean near 0.
    assert abs(np.mean(result.loss - loss[:n])) < 0.005 * np.abs(loss[:n]).mean()
    # Nearly all paths are the same to rounding. What differs in a checkpoint's rule, such as the
    # first step's comparison with 0, hardly moves the mean but does move most of the paths.
    assert np.isclose(result.loss, loss[:n], rtol=1e-3, atol=1e-4).mean() >= 0.95


MLP = "fashion_mlp_at_Linf_eps0.05"


@pytest.mark.parametrize(("loss", "rank"), [("ce", None), ("dlr", None), ("dlr", 2), ("dlr", 5)])
def test_the_mlp_falls_as_to_the_reference(loss, rank):
    conformance(MLP, loss, 128, rank)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != MLP])
@pytest.mark.parametrize(("loss", "rank"), [("ce", None), ("dlr", None), ("dlr", 2)])
def test_the_cnn_falls_as_to_the_reference(setting, loss, rank):
    conformance(setting, loss, 128, rank)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("loss", "classes", "ranks"), [("ce", 2, None), ("dlr", 5, [2, 3, 4, 5])])
def test_a_linear_model_is_broken_exactly_where_the_boundary_is_within_epsilon(
    norm, loss, classes, ranks
):
    params, x, y, distance = linear_problem(norm, classes=classes)
    # A per cent on either side of each example's own distance.
    for epsilon in (0.99 * distance, 1.01 * distance):
        result = apgd(
            Partial(linear, params), x, y, threat_model=advmeta.ThreatModel(norm, epsilon), key=KEY,
            loss=loss, target_ranks=ranks, steps=30,
        )  # fmt: skip
        np.testing.assert_array_equal(result.is_adversarial, epsilon > distance)


@pytest.mark.parametrize("options", [dict(loss="ce"), dict(loss="margin", target_ranks=[2])])
def test_a_linear_model_is_broken_in_l1_exactly_where_the_boundary_is_within_epsilon(options):
    # The margin w (x - 0.5) falls fastest in the coordinates of the largest weights: the distance
    # is |margin| / ||w||_inf. Four share that weight, as the sparsest steps that the rule arrives
    # at have two entries, of equal size; the run must find these four among the twenty.
    rng = np.random.default_rng(0)
    w = rng.uniform(0.1, 0.5, 20) * rng.choice([-1, 1], 20)
    w[::5] = np.sign(w[::5])
    x = 0.5 + rng.uniform(-0.1, 0.1, size=(32, 20))
    margin = (x - 0.5) @ w
    distance, y = np.abs(margin), (margin < 0).astype(int)
    assert distance.max() < 0.4  # the bounds do not bind
    params = {"weight": jnp.stack([w, 0 * w], axis=1), "bias": jnp.array([-w.sum() / 2, 0])}
    for epsilon in (0.99 * distance, 1.01 * distance):
        result = apgd(
            Partial(linear, params), x, y, threat_model=advmeta.ThreatModel("l1", epsilon), key=KEY,
            **options,
        )  # fmt: skip
        np.testing.assert_array_equal(result.is_adversarial, epsilon > distance)


def test_targeted_reaches_a_label_exactly_where_it_is_within_epsilon():
    params, x, y, distance = linear_problem("linf", classes=2)
    for epsilon in (0.99 * distance, 1.01 * distance):
        result = apgd(
            Partial(linear, params), x, 1 - y, targeted=True, steps=30, key=KEY,
            threat_model=advmeta.ThreatModel("linf", epsilon),
        )  # fmt: skip
        np.testing.assert_array_equal(result.is_adversarial, epsilon > distance)
        reached = linear(params, result.x_adv).argmax(axis=1) == 1 - y
        np.testing.assert_array_equal(result.is_adversarial, reached)


@pytest.fixture(scope="module")
def mlp():
    """A small network, with images on the bounds, that an attack breaks in part."""
    x, y = load_images()
    apply, params = load_model("fashion_mlp_at")
    return Partial(apply, params), x[:21], y[:21]


quick = functools.partial(apgd, key=KEY, steps=10)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_points_stay_in_the_ball_and_the_bounds(mlp, norm):
    logits_fn, x, y = mlp
    epsilon = np.linspace(0, {"linf": 0.3, "l2": 3, "l1": 15}[norm], len(y)).astype(np.float32)
    threat_model = advmeta.ThreatModel(norm, epsilon)
    result = quick(logits_fn, x, y, threat_model=threat_model)
    assert (threat_model.distance(x, result.x_adv) <= epsilon * (1 + 1e-6) + 1e-7).all()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    misclassified = logits_fn(result.x_adv).argmax(axis=1) != y
    np.testing.assert_array_equal(result.is_adversarial, misclassified)
    assert 0 < result.is_adversarial.sum() < len(y)


def test_random_starts_lie_on_the_sphere():
    x = jnp.full([5, 30], 0.5) + jnp.arange(5)[:, None] / 100
    keys = jax.random.split(KEY, 5)
    for norm in ("linf", "l2", "l1"):
        threat_model = advmeta.ThreatModel(norm, 0.1)
        starts = random_start(threat_model, keys, x)
        np.testing.assert_allclose(threat_model.distance(x, starts), 0.1, rtol=1e-5)


def test_epsilon_an_example_is_a_loop_over_epsilons(mlp):
    logits_fn, x, y = mlp
    epsilons = np.tile(np.float32([0.02, 0.05, 0.1]), 7)
    together = quick(logits_fn, x, y, threat_model=advmeta.ThreatModel("linf", epsilons))
    for epsilon in (0.02, 0.05, 0.1):
        alone = quick(logits_fn, x, y, threat_model=advmeta.ThreatModel("linf", epsilon))
        rows = np.isclose(epsilons, epsilon)
        np.testing.assert_array_equal(together.is_adversarial[rows], alone.is_adversarial[rows])
        np.testing.assert_allclose(together.loss[rows], alone.loss[rows], rtol=1e-4)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.05), ("l1", 5.0)])
def test_neither_order_nor_batch_size_matter(mlp, norm, epsilon):
    logits_fn, x, y = mlp
    attack = functools.partial(quick, logits_fn, threat_model=advmeta.ThreatModel(norm, epsilon))
    whole = attack(x, y)
    order = np.random.default_rng(0).permutation(len(y))
    shuffled = attack(x[order], y[order])
    np.testing.assert_array_equal(shuffled.is_adversarial, whole.is_adversarial[order])
    np.testing.assert_allclose(shuffled.loss, whole.loss[order], rtol=1e-3, atol=1e-4)
    parts = [attack(x[i : i + 7], y[i : i + 7]) for i in range(0, len(y), 7)]
    np.testing.assert_array_equal(
        np.concatenate([part.is_adversarial for part in parts]), whole.is_adversarial
    )


def test_restarts_and_ranks_keep_what_was_broken_before(mlp):
    logits_fn, x, y = mlp
    attack = functools.partial(
        quick, logits_fn, x, y, threat_model=advmeta.ThreatModel("linf", 0.05)
    )
    for few, many in [
        (dict(restarts=1), dict(restarts=4)),
        (dict(loss="dlr", target_ranks=[2]), dict(loss="dlr", target_ranks=[2, 3, 4])),
    ]:
        first, all_runs = attack(**few), attack(**many)
        kept = np.asarray(first.is_adversarial)
        assert 0 < kept.sum() < len(y)
        assert all_runs.is_adversarial[kept].all()
        np.testing.assert_array_equal(all_runs.x_adv[kept], first.x_adv[kept])
        assert (all_runs.loss >= first.loss)[~kept].all()


def test_jit_and_vmap_change_nothing():
    params, x, y, distance = linear_problem("l2", n=8)
    threat_model = advmeta.ThreatModel("l2", float(np.median(distance)))

    def attack(params):
        return quick(Partial(linear, params), x, y, threat_model=threat_model, loss="dlr")

    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), params)
    together = jax.jit(jax.vmap(attack))(stacked)
    for i in range(3):
        alone = attack(jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        np.testing.assert_array_equal(together.is_adversarial[i], alone.is_adversarial)
        np.testing.assert_allclose(together.x_adv[i], alone.x_adv, atol=1e-5)


def test_new_weights_epsilon_ranks_and_key_do_not_recompile():
    params, x, y, _ = linear_problem("l2", n=8)
    compiled = 0

    def counted(params, x):
        nonlocal compiled
        compiled += 1  # the body of a traced function runs once a compilation
        return linear(params, x)

    def attack(params, epsilon, rank, key):
        return apgd(
            Partial(counted, params), x, y, threat_model=advmeta.ThreatModel("l2", epsilon),
            key=key, loss="dlr", target_ranks=[rank], steps=5,
        )  # fmt: skip

    attack(params, 0.1, 2, KEY)
    first = compiled
    attack(jax.tree.map(lambda leaf: 2 * leaf, params), 0.2, 3, jax.random.key(1))
    # The shape of the logits is asked for each time, at the door and twice; nothing else is traced.
    assert compiled - first <= 2 < first


def test_each_step_costs_one_forward_and_one_backward_pass():
    counts = {"forward": 0, "backward": 0}

    def count(name):
        counts[name] += 1

    @jax.custom_vjp
    def model(x):
        return x @ jnp.array([[1.0, -1.0], [0.0, 1.0]])

    def forward(x):
        jax.debug.callback(count, "forward")
        return x @ jnp.array([[1.0, -1.0], [0.0, 1.0]]), None

    def backward(_, g):
        jax.debug.callback(count, "backward")
        return (g @ jnp.array([[1.0, -1.0], [0.0, 1.0]]).T,)

    model.defvjp(forward, backward)
    x, y = jnp.array([[0.9, 0.1]]), jnp.array([0])
    quick(model, x, y, threat_model=advmeta.ThreatModel("linf", 0.01))
    jax.effects_barrier()
    assert counts == {"forward": 11, "backward": 11}  # the start and ten steps


def test_a_model_that_ignores_its_key_gets_the_deterministic_attack(mlp):
    logits_fn, x, y = mlp
    attack = functools.partial(
        quick, x=x, y=y, threat_model=advmeta.ThreatModel("linf", 0.05), x_init=x
    )
    plain, averaged = attack(logits_fn), attack(lambda x, key: logits_fn(x), eot_samples=3)
    np.testing.assert_array_equal(averaged.is_adversarial, plain.is_adversarial)
    np.testing.assert_allclose(averaged.loss, plain.loss, rtol=1e-3, atol=1e-4)


def test_averaging_gradients_finds_what_one_noisy_gradient_does_not():
    params, x, y, distance = linear_problem("l2", n=16)

    def noisy(x, key):
        noise = jax.random.normal(key, params["weight"].shape)
        # Noise in the gradient only, far larger than the signal: the value is that of the mean.
        shaken = x @ (5 * noise)
        return linear(params, x) + shaken - jax.lax.stop_gradient(shaken)

    def broken(samples):
        result = apgd(
            noisy, x, y, key=KEY, eot_samples=samples, steps=15,
            threat_model=advmeta.ThreatModel("l2", 1.5 * distance),
        )  # fmt: skip
        return int(result.is_adversarial.sum())

    assert broken(60) == 16
    assert broken(1) < 12


def test_few_classes_get_a_note():
    params, x, y, _ = linear_problem("l2", n=4, classes=3)
    result = quick(
        Partial(linear, params), x, y, threat_model=advmeta.ThreatModel("l2", 0.1),
        loss="dlr", target_ranks=range(2, 11),
    )  # fmt: skip
    assert result.note == (
        "the targeted DLR loss needs 4 classes and the model has 3: used the margin loss instead; "
        "the model has 3 classes: left out 7 target ranks above"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=0), "steps=0, restarts=1: each must be at least 1"),
        (dict(eot_samples=0), "eot_samples=0"),
        (dict(targeted=True, target_ranks=[2]), "give one of the two"),
        (dict(target_ranks=[1]), "rank 1 is the class that the model predicts"),
        (dict(loss="hinge"), "'hinge' is unknown; write one of"),
        (dict(x_init=jnp.zeros([2, 3])), r"x_init has shape \(2, 3\); it must be x's, \(2, 2\)"),
    ],
)
def test_what_cannot_be_says_what_to_write(options, message):
    x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
    with pytest.raises(ValueError, match=message):
        apgd(lambda x: x, x, y, threat_model=advmeta.ThreatModel(), key=KEY, **options)
