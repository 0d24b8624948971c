"""`advmeta.attacks.square` and its windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import advmeta
from advmeta.attacks import square_windows
from advmeta.attacks.square_attack import _square
from advmeta.attacks.square_moves import move_mass_l1, move_mass_l2
from advmeta.attacks.square_windows import Grid
from advmeta.attacks.threat_model import example_keys
from tests import fixtures

KEY = jax.random.key(0)


def linear(w, x):
    """Two classes whose margin, class 0 over class 1, is the sum of w * (x - 0.5)."""
    margin = ((x - 0.5) * w).reshape(x.shape[0], -1).sum(axis=1)
    return jnp.stack([margin, jnp.zeros_like(margin)], axis=1)


def at_distances(w, distances, dual_norm):
    """Points x that far from the plane: their margin is d ||w||_dual."""
    return 0.5 + np.stack([d * dual_norm * w / np.square(w).sum() for d in distances]).astype("f")


def reachable_weights(shape, seed=0):
    """Random weights, 0 in the last row and column, where the windows never are."""
    rng = np.random.default_rng(seed)
    w = rng.choice([-1, 1], shape) * rng.uniform(0.5, 1.5, shape)
    w[-1], w[:, -1] = 0, 0
    return w


def test_linf_breaks_exactly_what_is_nearer_than_epsilon():
    # The optimum moves each pixel by epsilon against the sign of its weight and lowers the margin
    # by epsilon ||w||_1. On 8 x 8 pixels the windows are single pixels from iteration 2001 on.
    w = reachable_weights((8, 8, 1))
    distances = np.linspace(0.9, 1.1, 8) * 0.05
    x = at_distances(w, distances, np.abs(w).sum())
    result = advmeta.attacks.square(
        Partial(linear, jnp.asarray(w)), x, jnp.zeros(8, int), key=KEY, queries=3000,
        threat_model=advmeta.ThreatModel("linf", 0.05),
    )  # fmt: skip
    assert result.is_adversarial.tolist() == (distances < 0.05).tolist()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_bumps_break_what_is_nearer_than_epsilon_by_a_margin(norm):
    # The optimum lowers the margin by epsilon ||w||_2 along -w in l2, and by epsilon ||w||_inf in
    # any coordinates of the largest weight in l1. Bumps cannot build that exactly, so there is a
    # gap; nothing beyond epsilon can be broken.
    ramp = np.linspace(-1, 1, 12)
    w = np.add.outer(ramp, ramp)[..., None]
    # For l1 all weigh the same: bumps never come down to the one pixel of the largest weight.
    w = w if norm == "l2" else np.sign(w)
    w[-1], w[:, -1] = 0, 0
    distances = np.array([0.4, 0.5, 0.6, 1.01, 1.2]) * 0.3
    x = at_distances(w, distances, np.sqrt(np.square(w).sum()) if norm == "l2" else np.abs(w).max())
    result = advmeta.attacks.square(
        Partial(linear, jnp.asarray(w)), x, jnp.zeros(5, int), key=KEY, queries=3000,
        threat_model=advmeta.ThreatModel(norm, 0.3),
    )  # fmt: skip
    assert result.is_adversarial.tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_vectors_have_intervals_for_windows(norm):
    w = np.random.default_rng(1).normal(size=20)
    dual = np.abs(w).sum() if norm == "linf" else np.sqrt(np.square(w).sum())
    distances = np.array([0.6, 0.75, 1.05]) * 0.05
    result = advmeta.attacks.square(
        Partial(linear, jnp.asarray(w)), at_distances(w, distances, dual), jnp.zeros(3, int),
        key=KEY, threat_model=advmeta.ThreatModel(norm, 0.05),
    )  # fmt: skip
    assert result.is_adversarial.tolist() == [True, True, False]


def test_schedule_is_the_reference_s():
    changes = [0, 11, 51, 201, 501, 1001, 2001, 4001]
    for side, expected in ((28, [25, 18, 13, 9, 6, 4, 3, 2]), (32, [29, 20, 14, 10, 7, 5, 4, 3])):
        sides = square_windows.sides(Grid(side, side, 1), "linf", 5000, 0.8, False)
        assert sides[changes].tolist() == expected
        assert (np.flatnonzero(np.diff(sides)) + 1).tolist() == changes[1:]
    # max(round, 3), made odd.
    sides = square_windows.sides(Grid(28, 28, 1), "l2", 5000, 0.8, False)
    assert sides[changes].tolist() == [25, 19, 13, 9, 7, 5, 3, 3]
    # Stretched from 10,000 to 5,000 queries, iteration 26 is in the place of 52.
    rescaled = square_windows.sides(Grid(28, 28, 1), "linf", 5000, 0.8, True)
    assert rescaled[[25, 26]].tolist() == [18, 13]
    assert square_windows.sides(Grid(2, 2, 1), "l2", 10, 0.8, False).max() == 1  # none overflows


def test_windows_are_where_the_schedule_says_and_never_in_the_last_row_and_column():
    grid, sides = Grid(9, 40, 3), jnp.array([5, 2, 1] * 200)
    draws = square_windows.draw(jax.random.split(KEY, 4), 600, grid, positions=1)
    window = square_windows.windows(draws, sides, jnp.tile(jnp.arange(600), (4, 1)), grid)
    bits = jnp.broadcast_to(window.bits, (4, 600, 9, 3, 2)).reshape(-1, 9, 3, 2)
    mask = np.asarray(square_windows.unpack(bits, grid)).reshape(4, 600, 9, 40, 3)
    assert (mask.any(axis=(3, 4)).sum(axis=2) == np.asarray(sides)).all()
    assert (mask.any(axis=(2, 4)).sum(axis=2) == np.asarray(sides)).all()
    assert (mask.sum(axis=(2, 3, 4)) == 3 * np.asarray(sides) ** 2).all()
    assert not mask[:, :, -1].any() and not mask[:, :, :, -1].any()
    assert mask[:, :, :-1, :-1].any(axis=(0, 1)).all()
    signs = np.asarray(window.signs)
    assert set(np.unique(signs)) == {0, 2**32 - 1}
    assert abs((signs > 0).mean() - 0.5) < 0.02  # 7,200 signs: three standard deviations


def test_passing_over_proposals_that_change_nothing_changes_nothing():
    # The same search, one proposal after the other, every one of them queried.
    logits_fn = Partial(_tiny, jax.random.normal(KEY, (6 * 6 * 2, 4)))
    x = jax.random.uniform(jax.random.key(1), (5, 6, 6, 2))
    y = logits_fn(x).argmax(axis=1)
    ball = advmeta.ThreatModel("linf", 0.02)
    result = advmeta.attacks.square(logits_fn, x, y, threat_model=ball, key=KEY, queries=400)
    grid, keys = Grid(6, 6, 2), jax.vmap(lambda k: jax.random.fold_in(k, 0))(example_keys(KEY, x))
    sides = jnp.asarray(square_windows.sides(grid, "linf", 400, 0.8, False))
    draws = square_windows.draw(keys, 400, grid, positions=1)
    lower, upper = jnp.clip(x - 0.02, 0, 1), jnp.clip(x + 0.02, 0, 1)
    signs = square_windows.stripes(draws, grid)
    margin = advmeta.attacks.losses.margin

    def render(signs):
        return jnp.where(square_windows.unpack(signs, grid), upper, lower)

    def turn(carry, t):
        signs, best = carry
        w = square_windows.windows(draws, sides, jnp.full((5, 1), t), grid)
        bits, fill = w.bits[:, 0], w.signs[:, 0, None, :, None]
        new = (signs & ~bits) | (fill & bits)
        loss = margin(logits_fn(render(new)), y)
        accept = (best <= 0) & (loss > best)
        return (
            jnp.where(accept[:, None, None, None], new, signs),
            jnp.where(accept, loss, best),
        ), 0

    start = (signs, margin(logits_fn(render(signs)), y))
    (signs, best), _ = jax.lax.scan(turn, start, jnp.arange(400))
    assert not result.is_adversarial.all()  # else the search would be too short to tell
    np.testing.assert_allclose(result.x_adv, render(signs), atol=1e-6)
    np.testing.assert_allclose(result.loss, best, atol=1e-5)


def _tiny(w, x):
    return jnp.tanh(x.reshape(x.shape[0], -1) - 0.5) @ w


@pytest.mark.parametrize("side", [3, 5, 6, 13])
@pytest.mark.parametrize(("norm", "order", "power"), [("l2", 2, 2), ("l1", 1, 4)])
def test_bumps_are_rings_around_two_middles(norm, order, power, side):
    # Ring k of a half covers all within k rows and columns of its middle and adds 1 / (k+1)^power.
    def rings(height, width):
        bump = np.zeros((height, width))
        for k in range(max(height // 2 + 1, width // 2 + 1)):
            row, column = height // 2, width // 2
            rows = slice(max(row - k, 0), row + k + 1)
            bump[rows, max(column - k, 0) : column + k + 1] += 1 / (k + 1) ** power
        return bump / np.linalg.norm(bump.ravel(), order)

    expected = np.concatenate([rings(side // 2, side), -rings(side - side // 2, side)])
    split, cross, scale = (t[0] for t in square_windows.profiles(np.array([side]), False, norm))
    bump = np.minimum.outer(split, cross) * scale[:, None]
    np.testing.assert_allclose(bump, expected / 2 ** (1 / order), atol=1e-6)


def test_moving_mass_is_the_reference_s_formula():
    rng = np.random.default_rng(0)
    grid, sides, epsilon = Grid(9, 9, 3), np.array([3, 5]), 1.5
    delta = rng.normal(size=(4, 3, 9, 9)).astype("f")
    delta *= 1.2 / np.sqrt(np.square(delta).sum(axis=(1, 2, 3), keepdims=True))
    draws = square_windows.draw(jax.random.split(KEY, 4), 2, grid, positions=2)
    some = square_windows.bump_windows(draws, sides, jnp.arange(2), grid, jnp.float32, "l2")
    for t in (0, 1):
        window = jax.tree.map(lambda a, t=t: a[t], some)
        to, emptied, bump = (np.asarray(v) for v in square_windows.paint(*window))
        assert (to.sum(axis=(1, 2, 3)) == sides[t] ** 2).all()
        np.testing.assert_allclose(np.square(bump).sum(axis=(2, 3)), 1, rtol=1e-5)
        union = np.maximum(to, emptied)
        squared_total = np.square(delta).sum(axis=(1, 2, 3), keepdims=True)
        squared_windows = np.square(delta * union).sum(axis=(1, 2, 3), keepdims=True)
        new = bump + delta * to / np.sqrt(np.square(delta * to).sum(axis=(2, 3), keepdims=True))
        new /= np.sqrt(np.square(new).sum(axis=(2, 3), keepdims=True))
        new *= np.sqrt((epsilon**2 - squared_total) / 3 + squared_windows)
        expected = np.where(to > 0, new, delta * (1 - emptied))
        expected *= epsilon / np.sqrt(np.square(expected).sum(axis=(1, 2, 3), keepdims=True))
        got = move_mass_l2(jnp.asarray(delta), window, jnp.full((4, 1, 1, 1), epsilon))
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_moving_mass_in_l1_is_the_reference_s_formula():
    rng = np.random.default_rng(0)
    grid, sides, epsilon = Grid(9, 9, 3), np.array([5]), 1.5
    delta = rng.normal(size=(4, 3, 9, 9)).astype("f")
    delta *= 1.2 / np.abs(delta).sum(axis=(1, 2, 3), keepdims=True)
    draws = square_windows.draw(jax.random.split(KEY, 4), 1, grid, positions=2)
    some = square_windows.bump_windows(draws, sides, jnp.arange(1), grid, jnp.float32, "l1")
    window = jax.tree.map(lambda a: a[0], some)
    to, emptied, bump = (np.asarray(v) for v in square_windows.paint(*window))
    np.testing.assert_allclose(np.abs(bump).sum(axis=(2, 3)), 1, rtol=1e-5)

    def norm(v):
        return np.abs(v).sum(axis=(2, 3), keepdims=True)

    new = bump + delta * to / norm(delta * to)
    # Of the 1.5, 1.2 are spent: 0.3 are left, shared by three channels and multiplied by three.
    new *= (0.3 / 3 + norm(delta * np.maximum(to, emptied))) * 3 / norm(new)
    expected = np.where(to > 0, new, delta * (1 - emptied))
    got = move_mass_l1(jnp.asarray(delta), window, jnp.full((4, 1, 1, 1), epsilon))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_bump_that_undoes_what_is_there_stays_in_the_ball():
    # With d = -a b in the window, b + d / ||d|| is 0: all that is left to scale up is rounding.
    grid, sides, n = Grid(8, 8, 1), np.array([3]), 64
    draws = square_windows.draw(jax.random.split(KEY, n), 1, grid, positions=2)
    some = square_windows.bump_windows(draws, sides, jnp.arange(1), grid, jnp.float32, "l2")
    window = jax.tree.map(lambda a: a[0], some)
    _, _, bump = square_windows.paint(*window)
    a = jnp.linspace(0.1, 1.4, n).reshape(n, 1, 1, 1)
    got = move_mass_l2(-a * bump, window, jnp.full((n, 1, 1, 1), 1.5))
    assert (jnp.sqrt(jnp.square(got).sum(axis=(1, 2, 3))) <= 1.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_results_are_in_the_ball_and_depend_neither_on_order_nor_on_the_batch(norm):
    logits_fn = Partial(_tiny, jax.random.normal(KEY, (8 * 7 * 3, 5)))
    x = jax.random.uniform(jax.random.key(1), (12, 8, 7, 3))
    y = logits_fn(x).argmax(axis=1)
    epsilon = jnp.linspace(0.01, 0.1, 12) * {"linf": 1, "l2": 10, "l1": 15}[norm]
    ball = advmeta.ThreatModel(norm, epsilon)

    def attack(index):
        return advmeta.attacks.square(
            logits_fn, x[index], y[index], key=KEY, queries=200, restarts=2,
            threat_model=advmeta.ThreatModel(norm, epsilon[index]),
        )  # fmt: skip

    result, order = attack(jnp.arange(12)), jax.random.permutation(KEY, 12)
    assert 0 < result.is_adversarial.sum() < 12
    assert (ball.distance(x, result.x_adv) <= epsilon * (1 + 1e-5)).all()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    assert (result.is_adversarial == (logits_fn(result.x_adv).argmax(axis=1) != y)).all()
    shuffled, part = attack(order), attack(jnp.tile(jnp.arange(3, 6), 4))
    np.testing.assert_allclose(shuffled.x_adv, result.x_adv[order], atol=1e-5)
    np.testing.assert_allclose(part.x_adv[:3], result.x_adv[3:6], atol=1e-5)


def test_targeted_search_ends_in_the_target_and_gray_images_need_no_channel_axis():
    logits_fn = Partial(_tiny, jax.random.normal(KEY, (64, 4)))
    x = jax.random.uniform(jax.random.key(1), (6, 8, 8))
    target = (logits_fn(x).argmax(axis=1) + 1) % 4
    ball = advmeta.ThreatModel("linf", 0.3)
    result = advmeta.attacks.square(
        logits_fn, x, target, threat_model=ball, key=KEY, queries=500, targeted=True
    )
    is_target = logits_fn(result.x_adv).argmax(axis=1) == target
    assert is_target.sum() >= 3
    np.testing.assert_array_equal(result.is_adversarial, is_target)
    np.testing.assert_array_equal(result.loss > 0, is_target)


def test_x_init_is_where_it_starts():
    logits_fn = Partial(_tiny, jax.random.normal(KEY, (64, 4)))
    x = jax.random.uniform(jax.random.key(1), (6, 8, 8, 1))
    y = logits_fn(x).argmax(axis=1)
    for norm in ("linf", "l2"):
        ball = advmeta.ThreatModel(norm, 0.5)
        broken = advmeta.attacks.square(logits_fn, x, y, threat_model=ball, key=KEY, queries=500)
        assert broken.is_adversarial.any()
        start = jnp.where(broken.is_adversarial[:, None, None, None], broken.x_adv, x)
        again = advmeta.attacks.square(
            logits_fn, x, y, threat_model=ball, key=jax.random.key(9), queries=1, x_init=start
        )
        found = np.asarray(broken.is_adversarial)
        assert again.is_adversarial[found].all()
        np.testing.assert_array_equal(again.x_adv[found], start[found])


def test_new_weights_and_another_epsilon_need_no_second_compilation():
    x = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))

    def attack(seed, epsilon):
        logits_fn = Partial(_tiny, jax.random.normal(jax.random.key(seed), (64, 4)))
        return advmeta.attacks.square(
            logits_fn, x, jnp.zeros(3, int), key=KEY, queries=10,
            threat_model=advmeta.ThreatModel("linf", epsilon),
        )  # fmt: skip

    attack(0, 0.1)
    before = _square._cache_size()
    attack(1, 0.2)
    assert _square._cache_size() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries=0"),
        ({"restarts": 0}, "restarts=0"),
        ({"p_init": 1.5}, r"share of the image: it must be in \(0, 1\]"),
        ({"x_init": jnp.zeros((2, 3))}, "x_init has shape"),
        ({"x": jnp.zeros((2, 3, 3, 3, 1))}, "reshape x"),
    ],
)
def test_errors_say_what_to_do(options, message):
    arguments = {"x": jnp.zeros((2, 8, 8, 1)), **options}
    with pytest.raises(ValueError, match=message):
        advmeta.attacks.square(
            lambda x: x.reshape(2, -1)[:, :3], y=jnp.zeros(2, int), key=KEY,
            threat_model=advmeta.ThreatModel(), **arguments,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["fashion_mlp_at_Linf_eps0.05", "fashion_cnn_at_L2_eps1.5"])
def test_robust_accuracy_is_near_the_reference_s(setting):
    # Both are random, so accuracies are compared; on the CNN for a part of the images.
    name, norm, epsilon = fixtures.SETTINGS[setting]
    n = 256 if name == "fashion_mlp_at" else 40
    logits_fn = Partial(*fixtures.load_model(name))
    x, y = (v[:n] for v in fixtures.load_images())
    result = advmeta.attacks.square(
        logits_fn, x, y, threat_model=advmeta.ThreatModel(norm, epsilon), key=KEY
    )
    robust = np.asarray(~result.is_adversarial & (logits_fn(x).argmax(axis=1) == y))
    expected = fixtures.load_reference(setting)["autoattack_square"][:n]
    assert abs(robust.sum() - expected.sum()) <= 3
