"""`advmeta.autoattack`: the ensemble, its ledger, its curve, its state file."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import advmeta
from advmeta.attacks import AttackResult, apgd, fab, square
from advmeta.attacks.auto_pgd import _apgd
from advmeta.evaluation.survivors import bucket_size
from advmeta.evaluation.versions import attack_list
from tests import fixtures

KEY = jax.random.key(0)
LINF = advmeta.ThreatModel("linf", 0.05)

# The kinds of the standard ensemble with small budgets.
QUICK = (
    ("apgd-ce", partial(apgd, loss="ce", steps=10)),
    ("apgd-t", partial(apgd, loss="dlr", target_ranks=(2,), steps=10)),
    ("fab-t", partial(fab, target_ranks=(3,), steps=5, stop_at_epsilon=True)),
    ("square", partial(square, queries=50)),
)


@pytest.fixture(scope="module")
def mlp():
    x, y = fixtures.load_images()
    return Partial(*fixtures.load_model("fashion_mlp_at")), x[:24], y[:24]


def sum_model(x):
    """Margin of class 0 over class 1: the sum of x - 0.5; linf distance margin / d."""
    margin = (x - 0.5).reshape(x.shape[0], -1).sum(axis=1)
    return jnp.stack([margin, jnp.zeros_like(margin)], axis=1)


def constant_images(*values):
    return jnp.asarray(values)[:, None, None, None] * jnp.ones((1, 4, 4, 1))


def darken(logits_fn, x, y, *, threat_model, key):
    """The optimum against `sum_model`."""
    del logits_fn, key
    x_adv = jnp.clip(x - threat_model.radius(x), 0, 1)
    return AttackResult(x_adv, jnp.zeros(y.shape, bool), jnp.zeros(y.shape))


def do_nothing(logits_fn, x, y, *, threat_model, key):
    del logits_fn, threat_model, key
    return AttackResult(x, jnp.zeros(y.shape, bool), jnp.zeros(y.shape))


def assert_same(a, b):
    for name in ("x_adv", "robust", "robust_accuracy", "clean_accuracy"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for u, v in zip(a.ledger, b.ledger, strict=True):
        np.testing.assert_array_equal(u, v)


# Conformance


def robust_flags(setting, index):
    name, norm, epsilon = fixtures.SETTINGS[setting]
    x, y = fixtures.load_images()
    result = advmeta.autoattack(
        Partial(*fixtures.load_model(name)), x[index], y[index], key=KEY,
        threat_model=advmeta.ThreatModel(norm, epsilon), batch_size=64,
    )  # fmt: skip
    return np.asarray(result.robust)


@pytest.mark.slow
def test_standard_is_within_one_image_of_the_reference_on_the_mlp():
    setting = "fashion_mlp_at_Linf_eps0.05"
    expected = fixtures.load_reference(setting)["autoattack_standard"]
    robust = robust_flags(setting, np.arange(256))
    assert abs(robust.sum() - expected.sum()) <= 1
    assert (robust != expected).sum() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["fashion_cnn_at_Linf_eps0.1", "fashion_cnn_at_L2_eps1.5"])
def test_standard_agrees_with_the_reference_on_the_hardest_images_of_the_cnn(setting):
    # What is broken, but not by each attack, and some that are robust: 32 of 256, for time. All of
    # the 256 agreed when it was tried.
    reference = fixtures.load_reference(setting)
    attacks = ("apgd_ce", "apgd_t", "fab_t", "square")
    votes = np.sum([reference[f"autoattack_{attack}"] for attack in attacks], axis=0)
    standard, clean = reference["autoattack_standard"], reference["autoattack_clean"]
    contested = np.flatnonzero((votes > 0) & clean & ~standard)
    index = np.concatenate([contested, np.flatnonzero(standard)])[:32]
    assert abs(robust_flags(setting, index).sum() - standard[index].sum()) <= 1


# Who is attacked, and what comes back


def test_flags_depend_neither_on_the_batch_size_nor_on_the_order(mlp):
    logits_fn, x, y = mlp
    attack = partial(
        advmeta.autoattack, logits_fn, threat_model=LINF, key=KEY, version="custom", attacks=QUICK
    )
    results = [attack(x, y, batch_size=size) for size in (256, 7)]
    order = np.random.default_rng(0).permutation(24)
    shuffled = attack(x[order], y[order])
    assert 0 < results[0].robust.sum() < results[0].clean_accuracy * 24
    for result in results[1:]:
        np.testing.assert_array_equal(result.robust, results[0].robust)
        np.testing.assert_array_equal(result.ledger.attack, results[0].ledger.attack)
        np.testing.assert_allclose(result.x_adv, results[0].x_adv, atol=1e-3)
    np.testing.assert_array_equal(shuffled.robust, results[0].robust[order])
    np.testing.assert_array_equal(shuffled.ledger.attack, results[0].ledger.attack[order])


def test_robust_and_misclassified_images_come_back_clean_and_broken_ones_are_what_is_said(mlp):
    logits_fn, x, y = mlp
    result = advmeta.autoattack(
        logits_fn, x, y, threat_model=LINF, key=KEY, version="custom", attacks=QUICK
    )
    names, robust = result.ledger.names(), np.asarray(result.robust)
    clean = np.asarray(logits_fn(x).argmax(axis=1) == y)
    np.testing.assert_array_equal(names == "clean", ~clean)
    np.testing.assert_array_equal(names == "", robust)
    assert result.clean_accuracy == clean.mean() and result.robust_accuracy == robust.mean()
    same = np.asarray((result.x_adv == x).all(axis=(1, 2, 3)))
    np.testing.assert_array_equal(same, robust | ~clean)
    np.testing.assert_array_equal(logits_fn(result.x_adv).argmax(axis=1) == y, robust)
    broken = ~robust
    distance = LINF.distance(x, result.x_adv)
    np.testing.assert_allclose(result.ledger.distance[broken], distance[broken])
    assert np.isinf(result.ledger.distance[robust]).all()
    assert (result.ledger.distance[broken] <= 0.05 + 1e-6).all()


def test_only_survivors_are_attacked_in_few_sizes_and_the_ledger_says_by_whom():
    # Distances 0.02, 0.04, 0.3 (x = 0.5 + distance), and -0.1 is misclassified as it is.
    x, seen = constant_images(0.52, 0.54, 0.8, 0.4), []

    def half(logits_fn, x, y, *, threat_model, key):
        seen.append([round(float(v), 2) for v in x[:, 0, 0, 0]])
        return darken(
            logits_fn, x, y, key=key,
            threat_model=advmeta.ThreatModel("linf", 0.5 * threat_model.epsilon),
        )  # fmt: skip

    result = advmeta.autoattack(
        sum_model, x, jnp.zeros(4, int), threat_model=LINF, key=KEY, version="custom",
        attacks=(("half", half), ("nothing", do_nothing), ("half", half), ("full", darken)),
    )  # fmt: skip
    assert result.robust.tolist() == [False, False, True, False]
    assert result.ledger.names().tolist() == ["half", "full", "", "clean"]
    assert result.ledger.run.tolist() == [1, 4, -1, 0]
    np.testing.assert_allclose(result.ledger.distance[:2], [0.025, 0.05], rtol=1e-4)
    assert [set(values) for values in seen] == [{0.52, 0.54, 0.8}, {0.54, 0.8}]
    assert {len(values) for values in seen} == {32}


def test_what_leaves_the_ball_or_is_not_a_number_does_not_count():
    def leave(logits_fn, x, y, *, threat_model, key):
        x_adv = jnp.where(x > 0.7, jnp.nan, jnp.zeros_like(x))
        return AttackResult(x_adv, jnp.ones(y.shape, bool), jnp.zeros(y.shape))

    result = advmeta.autoattack(
        sum_model, constant_images(0.6, 0.8), jnp.zeros(2, int), threat_model=LINF, key=KEY,
        version="custom", attacks=(("leave", leave),),
    )  # fmt: skip
    assert result.robust.tolist() == [True, True]
    assert "left the threat model" in result.note


def test_logits_that_are_nan_count_as_wrong_and_are_noted():
    x, y = np.zeros((5, 2), np.float32), np.array([0, 0, 0, 1, 1])
    broken = {"threat_model": advmeta.ThreatModel("linf", 0.1), "key": jax.random.key(0)}
    result = advmeta.autoattack(lambda x: x + jnp.nan, x, y, **broken)
    assert (result.clean_accuracy, result.robust_accuracy) == (0, 0)
    assert "the logits of 5 of 5 examples are NaN" in result.note


def test_batches_are_padded_to_eight_sizes_at_most():
    for batch_size in (1, 7, 8, 32, 100, 256):
        sizes = {bucket_size(n, batch_size) for n in range(1, batch_size + 1)}
        assert len(sizes) <= 8 and max(sizes) == batch_size
        assert all(bucket_size(n, batch_size) >= n for n in range(1, batch_size + 1))


def test_other_weights_epsilons_and_numbers_of_survivors_need_no_second_compilation(mlp):
    _, x, y = mlp

    def attack(scale, epsilon):
        apply, params = fixtures.load_model("fashion_mlp_at")
        params = jax.tree.map(lambda p: scale * p, params)
        advmeta.autoattack(
            Partial(apply, params), x, y, key=KEY, version="custom",
            threat_model=advmeta.ThreatModel("linf", epsilon), attacks=QUICK[:2],
        )  # fmt: skip

    attack(1.0, 0.01)
    before = _apgd._cache_size()
    attack(0.9, 0.02)
    assert _apgd._cache_size() == before


# Versions


def test_versions_have_the_reference_s_attacks_in_its_order():
    def counts(version, classes=10, custom=None):
        names = [name for name, _ in attack_list(version, classes, custom)[0]]
        return {name: names.count(name) for name in names}  # in order of appearance

    standard = {"apgd-ce": 1, "apgd-t": 9, "fab-t": 9, "square": 1}
    plus = {"apgd-ce": 5, "apgd-dlr": 5, "fab": 1, "square": 1, "apgd-t": 9, "fab-t": 9}
    for version, expected in (("standard", standard), ("plus", plus)):
        assert list(counts(version).items()) == list(expected.items())
    l1 = [name for name, _ in attack_list("standard", 10, norm="l1")[0]]
    assert l1 == 5 * ["apgd-ce"] + 5 * ["apgd-t"] + 9 * ["fab-t"] + ["square"]
    assert counts("rand") == {"apgd-ce": 1, "apgd-dlr": 1}
    assert counts("custom", custom=("square", "fab-t")) == {"square": 1, "fab-t": 9}
    attacks = dict(attack_list("plus", 10)[0])
    assert attacks["fab"].keywords["restarts"] == 5
    assert dict(attack_list("rand", 10)[0])["apgd-ce"].keywords["eot_samples"] == 20


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_fall_back_with_a_note(classes):
    def logits_fn(x):
        return jnp.stack([x[:, 0, 0, 0] * (k + 1) - 0.2 * k**2 for k in range(classes)], axis=1)

    x = jax.random.uniform(KEY, (4, 4, 4, 1))
    result = advmeta.autoattack(
        logits_fn, x, logits_fn(x).argmax(axis=1), threat_model=LINF, key=KEY, version="custom",
        attacks=(
            ("apgd-dlr", partial(apgd, loss="dlr", steps=5)),
            ("apgd-t", partial(apgd, loss="dlr", target_ranks=(2,), steps=5)),
        ),
    )  # fmt: skip
    assert f"needs 4 classes and the model has {classes}" in result.note
    assert ("needs 3 classes" in result.note) == (classes == 2)
    assert f"{classes - 1} targets instead of 9" in attack_list("standard", classes)[1]
    assert len(attack_list("standard", classes)[0]) == 1 + 2 * (classes - 1) + 1


def test_rand_judges_a_noisy_model_by_its_mean_logits():
    def noisy(x, key):
        return sum_model(x) + 0.3 * jax.random.normal(key, (x.shape[0], 2))

    # Noise of 0.3 in logits whose margins are 16 times the distance: 0.16, 0.8, 4.8.
    x, y = constant_images(0.51, 0.55, 0.8), jnp.zeros(3, int)
    result = advmeta.autoattack(noisy, x, y, threat_model=LINF, key=KEY, version="rand")
    assert not result.robust[0] and result.robust[2]
    with pytest.raises(ValueError, match="version='rand' is for models"):
        advmeta.autoattack(noisy, x, y, threat_model=LINF, key=KEY)


# The curve


def test_the_curve_is_monotone_and_exact():
    # Distances 0.02, 0.04, 0.3; the epsilons in no order, and 0 among them.
    x, y = constant_images(0.52, 0.54, 0.8, 0.4), jnp.zeros(4, int)
    result = advmeta.autoattack(
        sum_model, x, y, threat_model=LINF, key=KEY, version="custom",
        attacks=(("darken", darken),), epsilons=[0.05, 0.0, 0.03],
    )  # fmt: skip
    assert result.robust.tolist() == [
        [False, False, True, False], [True, True, True, False], [False, True, True, False],
    ]  # fmt: skip
    np.testing.assert_allclose(result.robust_accuracy, [0.25, 0.75, 0.5])
    assert result.x_adv.shape == (3, *x.shape)
    # What was broken at 0.03 is not attacked again at 0.05.
    np.testing.assert_allclose(result.ledger.distance[0, :2], [0.03, 0.05], rtol=1e-4)


def test_the_curve_is_monotone_even_where_an_attack_is_not(mlp):
    def unreliable(logits_fn, x, y, *, threat_model, key):
        result = darken(logits_fn, x, y, threat_model=threat_model, key=key)
        if threat_model.epsilon.max() > 0.06:
            return result._replace(x_adv=x)
        return result

    x = constant_images(0.52, 0.54, 0.57)
    result = advmeta.autoattack(
        sum_model, x, jnp.zeros(3, int), threat_model=LINF, key=KEY, version="custom",
        attacks=(("unreliable", unreliable),), epsilons=[0.03, 0.05, 0.1],
    )  # fmt: skip
    assert result.robust.sum(axis=1).tolist() == [2, 1, 1]


# Interruption


class Interrupter:
    """An attack that stands for the process being killed in its calls from the n-th on."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, *args, **options):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return QUICK[0][1](*args, **options)


@pytest.mark.parametrize("calls", [0, 1, 3, 5])
def test_an_interrupted_evaluation_ends_as_an_uninterrupted_one(mlp, tmp_path, calls):
    logits_fn, x, y = mlp

    def attack(calls, path):
        return advmeta.autoattack(
            logits_fn, x, y, threat_model=LINF, key=KEY, version="custom",
            attacks=(("first", Interrupter(calls)), QUICK[3]), batch_size=7,
            epsilons=[0.02, 0.05], state_path=path,
        )  # fmt: skip

    path = tmp_path / "state.npz"
    with pytest.raises(KeyboardInterrupt):
        attack(calls, path)
    with np.load(path, allow_pickle=False) as file:  # plain arrays only
        assert all(file[name].dtype != object for name in file.files)
    whole = attack(100, None)
    assert_same(attack(100, path), whole)
    assert_same(attack(0, path), whole)  # finished: nothing is attacked any more
    assert [p.name for p in tmp_path.iterdir()] == ["state.npz"]


def test_the_state_of_another_evaluation_is_refused(tmp_path):
    path = tmp_path / "deep" / "state.npz"
    x, y = constant_images(0.52, 0.8), jnp.zeros(2, int)

    def attack(logits_fn=sum_model, x=x, key=KEY, epsilon=0.05, attacks=(("darken", darken),)):
        return advmeta.autoattack(
            logits_fn, x, y, threat_model=advmeta.ThreatModel("linf", epsilon), key=key,
            version="custom", attacks=attacks, state_path=path,
        )  # fmt: skip

    attack()
    for change in (
        {"x": x + 0.01}, {"key": jax.random.key(1)}, {"epsilon": 0.06},
        {"attacks": (("darken", do_nothing),)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="with other examples, labels"):
            attack(**change)
    with pytest.raises(ValueError, match="of another model"):
        attack(lambda x: 2 * sum_model(x))
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a state of autoattack"):
        attack()


# At the door


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 255 * constant_images(0.5, 0.8)}, "divide 8-bit images by 255"),
        ({"y": jnp.zeros(2)}, r"y.astype\('int32'\)"),
        ({"y": jnp.array([0, 2])}, "the model has 2 classes"),
        ({"x": jnp.zeros((0, 4, 4, 1)), "y": jnp.zeros(0, int)}, "at least one example"),
        ({"logits_fn": lambda x: sum_model(x)[:1]}, "one row of logits an example"),
        ({"logits_fn": lambda x: sum_model(x)[:, :1]}, "nothing to misclassify"),
        ({"threat_model": advmeta.ThreatModel("linf", 8.0)}, "write 8 / 255"),
        ({"threat_model": advmeta.ThreatModel("l2", 4.1)}, "l2: 4"),
        ({"version": "strong"}, "the known ones are"),
        ({"version": "standard"}, "together with version='custom'"),
        ({"attacks": None}, "give attacks="),
        ({"attacks": ("apgd",)}, "there is no attack 'apgd'"),
        ({"attacks": (darken,)}, "is no attack: write a name"),
        ({"attacks": ()}, "empty list"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"epsilons": []}, "name at least one epsilon"),
        ({"epsilons": [0.1, -0.1]}, "at least 0"),
    ],
)
def test_errors_say_what_to_do(change, message):
    arguments = {
        "logits_fn": sum_model, "x": constant_images(0.5, 0.8), "y": jnp.zeros(2, int),
        "threat_model": LINF, "key": KEY, "version": "custom", "attacks": (("darken", darken),),
        **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        advmeta.autoattack(**arguments)


def test_probabilities_are_warned_of():
    with pytest.warns(UserWarning, match="check softmax_output"):
        advmeta.autoattack(
            lambda x: jax.nn.softmax(sum_model(x)), constant_images(0.6), jnp.zeros(1, int),
            threat_model=LINF, key=KEY, version="custom", attacks=(("darken", darken),),
        )  # fmt: skip


def test_the_progress_bar_names_the_attack(capsys):
    advmeta.autoattack(
        sum_model, constant_images(0.52, 0.8), jnp.zeros(2, int), threat_model=LINF, key=KEY,
        version="custom", attacks=(("darken", darken),), progress=True,
    )  # fmt: skip
    assert "darken: 50.0% robust" in capsys.readouterr().out
