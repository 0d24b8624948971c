import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmeta.attacks import losses

LOGITS = jnp.array([[4.0, 3.0, 1.0, 0.5], [4.0, 3.0, 1.0, 0.5]])
Y = jnp.array([0, 2])


def test_margin_and_dlr_are_what_they_are_by_hand():
    # Row 1: y is first, (3 - 4) / (4 - 1); row 2: y is third, (4 - 1) / (4 - 1).
    np.testing.assert_allclose(losses.margin(LOGITS, Y), [-1.0, 3.0])
    np.testing.assert_allclose(losses.dlr(LOGITS, Y), [-1 / 3, 1.0], rtol=1e-6)


def test_targeted_losses_are_what_they_are_by_hand():
    target = jnp.array([1, 0])
    # The denominator is 4 - (1 + 0.5) / 2 = 3.25 in both rows.
    np.testing.assert_allclose(losses.targeted_margin(LOGITS, Y, target), [-1.0, 3.0])
    expected = [-1 / 3.25, 3 / 3.25]
    np.testing.assert_allclose(losses.targeted_dlr(LOGITS, Y, target), expected, rtol=1e-6)
    expected = jax.nn.log_softmax(LOGITS)[jnp.arange(2), target]
    found = losses.targeted_cross_entropy(LOGITS, Y, target)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_no_label_is_right_where_a_logit_is_nan():
    # An argmax takes NaN for the largest: labels 0 and 1 would be right.
    logits = jnp.array([[2.0, 1.0], [1.0, 2.0], [jnp.nan, jnp.nan], [0.0, jnp.nan], [jnp.inf, 0]])
    found = losses.is_right(logits, jnp.array([0, 0, 0, 1, 0]))
    assert found.tolist() == [True, False, False, False, True]


def test_dlr_does_not_see_shift_and_scale():
    target = jnp.array([1, 0])
    other = 7.0 * LOGITS + 3.0
    np.testing.assert_allclose(losses.dlr(other, Y), losses.dlr(LOGITS, Y), rtol=1e-6)
    np.testing.assert_allclose(
        losses.targeted_dlr(other, Y, target), losses.targeted_dlr(LOGITS, Y, target), rtol=1e-6
    )


def test_gradient_of_dlr_is_exactly_zero_where_y_is_the_third_class():
    # There the loss is 1 whatever the logits; rounding noise would move an attack that takes signs.
    logits = jax.random.normal(jax.random.key(0), [500, 10]) * 7.3
    y = jnp.argsort(logits, axis=1)[:, -3]
    gradient = jax.grad(lambda z: losses.dlr(z, y).sum())(logits)
    assert not gradient.any()


@pytest.mark.parametrize("loss", [losses.dlr, losses.margin])
def test_gradients_are_those_of_finite_differences(loss):
    jax.test_util.check_grads(lambda z: loss(z, Y[:1]), (LOGITS[:1],), order=1, rtol=1e-2)


def test_target_ranks_follow_the_logits():
    logits = jnp.array([[0.1, 0.4, 0.3, 0.2]])
    assert [int(losses.target_of_rank(logits, rank)[0]) for rank in (1, 2, 3, 4)] == [1, 2, 3, 0]


@pytest.mark.parametrize(("classes", "towards"), [(2, False), (2, True), (3, True)])
def test_too_few_classes_fall_back_to_the_margin_with_a_note(classes, towards):
    loss, note = losses.resolve("dlr", classes, towards_a_class=towards)
    assert loss is (losses.targeted_margin if towards else losses.margin)
    assert f"the model has {classes}" in note
    logits, y, target = jnp.eye(classes), jnp.zeros(classes, int), jnp.ones(classes, int)
    if towards:
        np.testing.assert_array_equal(
            losses.targeted_dlr(logits, y, target), loss(logits, y, target)
        )
    else:
        np.testing.assert_array_equal(losses.dlr(logits, y), loss(logits, y))


def test_enough_classes_need_no_note():
    assert losses.resolve("dlr", 3, towards_a_class=False) == (losses.dlr, "")
    assert losses.resolve("dlr", 4, towards_a_class=True) == (losses.targeted_dlr, "")


def test_unknown_losses_and_ranks_are_refused():
    with pytest.raises(ValueError, match=r"'hinge' is unknown; write one of \['ce', 'dlr'"):
        losses.resolve("hinge", 10, towards_a_class=False)
    with pytest.raises(ValueError, match="rank 1 is the class that the model predicts"):
        losses.check_ranks([1, 2], 10)
    with pytest.raises(ValueError, match="only 3 classes"):
        losses.check_ranks([7], 3)
    assert losses.check_ranks(range(2, 11), 4) == (
        [2, 3, 4], "the model has 4 classes: left out 6 target ranks above"
    )  # fmt: skip
