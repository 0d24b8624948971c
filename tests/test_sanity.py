"""The sanity checks: an honest model passes, models built to be caught are."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import load_images, load_model, mlp
from fixtures.tiny import compile_fast as compile_fast
from jax.tree_util import Partial

import advmeta
from advmeta.attacks import losses
from advmeta.evaluation.sanity import checks as judging
from advmeta.evaluation.sanity import probes
from advmeta.evaluation.sanity.attempts import misjudged_planes

KEY = jax.random.key(0)
LINF = advmeta.ThreatModel("linf", 0.05)
LEFT_OUT = {"certified_bound", "full_disclosure"}


def scaled(weights, scale, x):
    return scale * mlp(weights, x)


def check(logits_fn, **options):
    x, y = load_images()
    found = advmeta.sanity_checks(
        logits_fn, x, y, threat_model=LINF, key=KEY, examples=32, **options
    )
    return {made.name: made for made in found}


def failed(made):
    return {name for name, one in made.items() if one.passed is False}


@pytest.fixture(scope="module")
def weights():
    return load_model("fashion_mlp_at")[1]


@pytest.fixture(scope="module")
def honest(weights):
    return check(Partial(scaled, weights, 1.0))


def test_every_number_of_the_list_is_there_once_with_a_verdict_or_a_reason(honest):
    assert [one.number for one in honest.values()] == list(range(1, 25))
    for one in honest.values():
        if one.name in LEFT_OUT:
            assert (one.value, one.threshold, one.passed) == (None, None, None)
            assert one.note.startswith("left out: ")
        else:
            assert one.passed == (one.value <= one.threshold) and one.note


def test_an_honest_model_passes_all_that_is_run(honest):
    assert {name for name, one in honest.items() if one.passed} == honest.keys() - LEFT_OUT


def test_the_same_key_gives_the_same_and_a_model_is_no_surrogate_of_itself(weights, honest):
    # What breaks the surrogate, itself, PGD has broken: the transfer adds no example.
    model = Partial(scaled, weights, 1.0)
    again = check(model, surrogate=model)
    differ = {name for name in honest if again[name] != honest[name]}
    assert differ == {"gradients_beat_none"}  # in its note
    assert again["gradients_beat_none"].value == 0
    assert "the surrogate's 0" in again["gradients_beat_none"].note


def test_saturated_logits_are_caught(weights):
    # exp(-1e4 gap) is 0 in float32: the cross-entropy of what is classified correctly is constant.
    made = check(Partial(scaled, weights, 1e4))
    assert {"useful_gradients", "unbounded_attack", "loss_rises"} <= failed(made)
    assert "scale the logits down" in made["useful_gradients"].note
    # The margin has the gradients that the cross-entropy lacks: PGD on it is another attack.
    made = check(Partial(scaled, weights, 1e4), loss=losses.margin)
    assert made["unbounded_attack"].passed and made["loss_rises"].passed


def test_a_quantised_input_is_caught(weights):
    def quantised(weights, x):
        return mlp(weights, jnp.round(4 * x) / 4)

    made = check(Partial(quantised, weights))
    caught = {"useful_gradients", "plain_program", "gradient_is_true", "unbounded_attack",
              "loss_rises", "gradients_beat_none"}  # fmt: skip
    assert caught <= failed(made)
    # The gradient is 0 and the function is not constant: all of what it does is missed.
    assert made["gradient_is_true"].value == 1
    assert "round (1)" in made["plain_program"].note


def test_a_stochastic_model_is_caught(weights):
    generator = np.random.default_rng(0)

    def stochastic(x):
        noise = generator.normal(scale=0.1, size=x.shape).astype(np.float32)
        return mlp(weights, x + noise)

    assert {"randomized_model", "batch_independence"} <= failed(check(stochastic))


def test_an_attack_that_stops_too_early_is_caught(weights):
    made = check(Partial(scaled, weights, 1.0), attack_steps=3, restarts=1)
    assert failed(made) == {"convergence"}
    assert made["convergence"].value == 1  # there is no rise before the last 10 steps


def test_probabilities_are_warned_of_by_the_name_of_the_check():
    x = jax.random.uniform(KEY, (4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # so that no attack is run
        with pytest.raises(UserWarning, match="check softmax_output: logits_fn returns prob"):
            advmeta.sanity_checks(jax.nn.softmax, x, jnp.zeros(4, int), threat_model=LINF, key=KEY)


def test_probabilities_and_too_few_classes_fail():
    batch = advmeta.Batch(jax.random.uniform(KEY, (4, 3)), jnp.zeros(4, jnp.int32))
    model = Partial(jax.nn.softmax)
    made = judging._of_the_model(model, batch, model(batch.x), LINF, KEY)
    values = {one.name: one.value for one in made if one.passed is False}
    # Of four outputs all are probabilities; three classes are one less than the targeted DLR needs.
    assert values == {"softmax_output": 1, "class_count": 1}


def test_probabilities_are_told_by_range_and_sum():
    rows = np.array([[0.25, 0.75], [-0.25, 1.25], [0.5, 0.6], [1 - 1e-7, 0.0], [np.nan, 0.5]])
    assert probes.are_probabilities(rows).tolist() == [True, False, False, True, False]


def test_the_program_is_searched_at_every_depth():
    def loop(x):
        return jax.lax.fori_loop(0, 2, lambda i, x: jax.jit(jnp.sign)(x), x)

    assert probes.suspicious_primitives(loop, jnp.ones((2, 3))) == ["scan (1)", "sign (1)"]
    plain = (jax.nn.relu, jax.nn.gelu, jax.nn.softmax, jax.nn.log_softmax)
    for function in plain:
        assert probes.suspicious_primitives(function, jnp.ones((2, 3))) == []
    stopped = probes.suspicious_primitives(jax.lax.stop_gradient, jnp.ones((2, 3)))
    assert stopped == ["stop_gradient (1)"]


def test_the_late_share_of_the_rise_is_a_mean_over_the_correct_examples():
    # 12 + 12 steps; what counts as late begins after 12 - 10 = 2. Example 0 rises evenly from 0 to
    # 24, 22 of it late; example 1 is highest after 2 steps; 2 is misclassified to begin with.
    even, early = np.arange(25.0), np.r_[0, 1, 2, np.zeros(22)]
    loss = np.stack([even, early, even], axis=1)
    late = judging._late_rise(loss, np.array([True, True, False]), 12)
    np.testing.assert_allclose(late, (22 / 24 + 0) / 2)
    assert judging._late_rise(np.zeros((25, 3)), np.ones(3, bool), 12) == 0
    assert judging._late_rise(loss, np.zeros(3, bool), 12) == 0


def test_falls_are_measured_against_rises():
    assert judging._falls(np.array([0.0, 3.0, 2.0, 4.0])) == 1 / 5
    assert judging._falls(np.zeros(4)) == 1


@pytest.mark.parametrize("value, passed", [(0.5, True), (0.6, False), (np.nan, False)])
def test_nothing_passes_but_what_is_at_most_the_threshold(value, passed):
    made = judging._check(7, "a_name", value, 0.5, "what it is", "do that")
    assert made.passed is passed
    assert made.note == ("what it is" if passed else "what it is: do that")


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.1), ("l2", 0.5), ("l1", 0.5)])
def test_pgd_knows_which_side_of_a_plane_it_can_reach(norm, epsilon):
    ball = advmeta.ThreatModel(norm, epsilon)
    loss = losses.cross_entropy
    planes = misjudged_planes((6, 4, 4, 1), ball, KEY, attack_steps=20, restarts=1, loss=loss)
    assert planes == 0


def test_epsilons_go_with_their_examples_and_those_come_from_all_over():
    batch = advmeta.Batch(jnp.arange(10.0)[:, None], jnp.arange(10))
    ball = advmeta.ThreatModel("linf", np.arange(10) / 100)
    some, radii = judging._spread(batch, ball, 4)
    np.testing.assert_array_equal(some.y, [0, 3, 6, 9])
    np.testing.assert_array_equal(some.x[:, 0], some.y)
    np.testing.assert_allclose(radii.epsilon, [0, 0.03, 0.06, 0.09])
    assert len(judging._spread(batch, LINF, 99)[0].y) == 10


def test_nan_logits_pass_no_check_of_outputs():
    def model(x):
        return jnp.full((len(x), 4), jnp.nan)

    assert np.isnan(probes.repeated(model, jnp.ones((2, 3))))
    assert np.isnan(probes.batch_dependence(Partial(model), jnp.ones((2, 3))))


def test_numbers_below_one_are_refused():
    x, y = jnp.full((2, 3), 0.5), jnp.zeros(2, int)
    with pytest.raises(ValueError, match="examples=0: each must be at least 1"):
        advmeta.sanity_checks(lambda x: x, x, y, threat_model=LINF, key=KEY, examples=0)
