import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import SETTINGS, linear, linear_problem, load_images, load_model, load_reference
from jax.tree_util import Partial

import advmeta
from advmeta.attacks import fab
from advmeta.attacks.projections import shortest_move

KEY = jax.random.key(0)


def bisected_move(x, w, gap, norm, bounds):
    """The same by bisection in float64: the move grows with lambda until <w, move> = gap."""
    direction = np.sign(w) * (1 if gap >= 0 else -1)
    room = np.where(direction > 0, bounds[1] - x, x - bounds[0])
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        move = np.minimum(middle * (np.abs(w) if norm == "l2" else 1.0), room) * direction
        low, high = (middle, high) if abs(w @ move) < abs(gap) else (low, middle)
    return move


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_shortest_move_is_the_one_found_by_bisection(norm):
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 2, size=(40, 30))
    x[:, :8] = rng.choice([-1, 2], size=(40, 8))  # on the bounds, where images are
    w = rng.normal(size=(40, 30)) * np.logspace(-3, 3, 40)[:, None]
    w[:, 8] = 0
    gap = rng.normal(size=40) * np.abs(w).sum(axis=1) / 3  # the last few bind almost everywhere
    found = shortest_move(*map(jnp.float32, (x, w, gap)), norm=norm, bounds=(-1.0, 2.0))
    expected = [bisected_move(*row, norm, (-1.0, 2.0)) for row in zip(x, w, gap, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def filled_move(x, w, gap, bounds):
    """The shortest move in l1: the coordinates of the largest weights one after the other."""
    direction = np.sign(w) * np.sign(gap)
    room = np.where(direction > 0, bounds[1] - x, x - bounds[0])
    move, left = np.zeros_like(x), abs(gap)
    for i in np.argsort(-np.abs(w)):
        if w[i] != 0:
            move[i] = min(room[i], left / abs(w[i]))
            left -= move[i] * abs(w[i])
    return move * direction


def test_shortest_move_in_l1_fills_the_heaviest_coordinates():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 2, size=(40, 30))
    x[:, :8] = rng.choice([-1, 2], size=(40, 8))  # on the bounds, where images are
    w = rng.normal(size=(40, 30)) * np.logspace(-3, 3, 40)[:, None]
    w[:, 8] = 0
    # From next to nothing to more than all coordinates can do.
    gap = np.linspace(-1.5, 1.5, 40) * np.abs(w).sum(axis=1)
    found = shortest_move(*map(jnp.float32, (x, w, gap)), norm="l1", bounds=(-1.0, 2.0))
    expected = [filled_move(*row, (-1.0, 2.0)) for row in zip(x, w, gap, strict=True)]
    # By what each coordinate does for the gap: the last one moves by what is left over a weight
    # that may be small, and then by a multiple of the rounding of all the others.
    scale = np.abs(w).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(w * found / scale, w * np.array(expected) / scale, atol=1e-6)
    np.testing.assert_allclose(np.abs(found).sum(1), np.abs(expected).sum(1), rtol=1e-5)


def test_equal_weights_share_what_is_left_in_l1():
    # 2 * 0.5 to the bound gives 1 of the 1.5; the two weights of 1, with room 1 and 0.25, share the
    # other half in that proportion. Any split is as short.
    x, w = jnp.array([[0.5, 0.0, 0.75, 0.2]]), jnp.array([[2.0, 1.0, 1.0, 0.5]])
    move = shortest_move(x, w, jnp.array([1.5]), norm="l1", bounds=(0.0, 1.0))
    np.testing.assert_allclose(move, [[0.5, 0.4, 0.1, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_shortest_move_goes_to_the_corner_nearest_to_a_plane_out_of_reach(norm):
    x, w = jnp.array([[0.2, 0.5, 0.9]]), jnp.array([[1.0, -2.0, 0.0]])
    move = shortest_move(x, w, jnp.array([10.0]), norm=norm, bounds=(0.0, 1.0))
    np.testing.assert_allclose(move, [[0.8, -0.5, 0.0]], rtol=1e-6)
    none = shortest_move(x, 0 * w, jnp.array([1.0]), norm=norm, bounds=(0.0, 1.0))
    np.testing.assert_array_equal(none, jnp.zeros([1, 3]))


def test_shortest_move_does_not_underflow_where_the_model_is_saturated():
    x, w = jnp.array([[0.5, 0.5]]), jnp.array([[3e-30, 4e-30]])
    move = shortest_move(x, w, jnp.array([5e-31]), norm="l2", bounds=(0.0, 1.0))
    np.testing.assert_allclose(move, [[0.06, 0.08]], rtol=1e-5)  # gap w / |w|^2


def conformance(setting, n):
    name, norm, epsilon = SETTINGS[setting]
    x, y = load_images()
    reference = load_reference(setting)
    result = fab(
        Partial(*load_model(name)), x[:n], y[:n], threat_model=advmeta.ThreatModel(norm, epsilon),
        key=KEY, target_ranks=range(2, 11), stop_at_epsilon=True,
    )  # fmt: skip
    robust, theirs = reference["fab_t_robust"][:n], reference["fab_t_distance"][:n]
    assert np.mean(~result.is_adversarial == robust) >= 0.99
    ours = np.where(result.is_adversarial, result.distance, 0)
    both = (ours > 0) & (theirs > 0)
    assert both.sum() > n // 16
    assert abs(np.median(ours[both]) / np.median(theirs[both]) - 1) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_networks_fall_as_to_the_reference(setting):
    conformance(setting, 128 if "mlp" in setting else 32)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("ranks", [None, [2, 3, 4, 5]])
def test_the_boundary_of_a_linear_model_is_found(norm, ranks):
    params, x, y, distance = linear_problem(norm)
    epsilon = float(np.median(distance))
    result = fab(
        Partial(linear, params), x, y, threat_model=advmeta.ThreatModel(norm, epsilon), key=KEY,
        target_ranks=ranks, steps=30,
    )  # fmt: skip
    np.testing.assert_allclose(result.distance, distance, rtol=0.01)
    clear = np.abs(distance / epsilon - 1) > 0.01
    np.testing.assert_array_equal(result.is_adversarial[clear], (distance < epsilon)[clear])
    # Points beyond epsilon are not handed out.
    moved = advmeta.ThreatModel(norm).distance(x, result.x_adv)
    np.testing.assert_allclose(moved, np.where(result.is_adversarial, result.distance, 0), 1e-5)


def test_targeted_finds_the_boundary_of_a_class():
    params, x, y, distance = linear_problem("l2", classes=2)
    result = fab(
        Partial(linear, params), x, 1 - y, threat_model=advmeta.ThreatModel("l2", 1.0), key=KEY,
        targeted=True, steps=30,
    )  # fmt: skip
    np.testing.assert_allclose(result.distance, distance, rtol=0.01)
    np.testing.assert_array_equal(linear(params, result.x_adv).argmax(axis=1), 1 - y)


quick = functools.partial(fab, key=KEY, steps=10, target_ranks=[2, 3])


def test_clean_errors_are_at_distance_zero_and_constant_models_at_infinity():
    x = jnp.full([2, 3], 0.5) + jnp.arange(3) / 10
    y = jnp.array([0, 1])  # the constant model says 0
    constant = lambda x: jnp.broadcast_to(jnp.array([1.0, 0.0, 0.0]), (x.shape[0], 3))  # noqa: E731
    result = quick(constant, x, y, threat_model=advmeta.ThreatModel("l2", 1.0))
    np.testing.assert_array_equal(result.distance, [jnp.inf, 0.0])
    np.testing.assert_array_equal(result.is_adversarial, [False, True])
    np.testing.assert_array_equal(result.x_adv, x)
    np.testing.assert_array_equal(result.loss, [-1.0, 1.0])


def test_distances_only_fall_with_restarts_and_epsilons_may_differ():
    x, y = load_images()
    x, y = x[:16], y[:16]
    epsilon = np.linspace(0.001, 0.2, 16).astype(np.float32)
    logits_fn = Partial(*load_model("fashion_mlp_at"))
    attack = functools.partial(
        quick, logits_fn, x, y, threat_model=advmeta.ThreatModel("linf", epsilon), steps=60
    )
    once, thrice = attack(), attack(restarts=3)
    assert (thrice.distance <= once.distance).all()
    assert (thrice.distance < once.distance).any()
    np.testing.assert_array_equal(once.is_adversarial, once.distance <= epsilon)
    assert 0 < once.is_adversarial.sum() < 16
    assert once.x_adv.min() >= 0 and once.x_adv.max() <= 1
    misclassified = logits_fn(once.x_adv).argmax(axis=1) != y
    np.testing.assert_array_equal(misclassified, once.is_adversarial)
    order = np.random.default_rng(0).permutation(16)
    shuffled = quick(
        logits_fn, x[order], y[order], steps=60,
        threat_model=advmeta.ThreatModel("linf", epsilon[order]),
    )  # fmt: skip
    np.testing.assert_allclose(shuffled.distance, once.distance[order], rtol=1e-3)


def test_jit_and_vmap_change_nothing():
    params, x, y, _ = linear_problem("l2", n=6)
    threat_model = advmeta.ThreatModel("l2", 0.1)

    def attack(params):
        return quick(Partial(linear, params), x, y, threat_model=threat_model)

    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), params)
    together = jax.jit(jax.vmap(attack))(stacked)
    for i in range(3):
        alone = attack(jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        np.testing.assert_allclose(together.distance[i], alone.distance, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(restarts=0), "restarts=0: each must be at least 1"),
        (dict(targeted=True), "give one of the two"),
        (dict(target_ranks=[0]), "rank 1 is the class that the model predicts"),
        (dict(x_init=jnp.zeros([1, 2])), "it must be x's"),
    ],
)
def test_what_cannot_be_says_what_to_write(options, message):
    x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
    with pytest.raises(ValueError, match=message):
        quick(lambda x: x, x, y, threat_model=advmeta.ThreatModel(), **options)
