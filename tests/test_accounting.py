"""What an evaluation cost, and who broke what."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import advmeta
from advmeta.attacks import apgd, fab, square
from advmeta.evaluation.accounting import Passes, contributions, passes
from advmeta.evaluation.ledger import Ledger

N, CLASSES = 8, 3


@pytest.mark.parametrize(
    ("attack", "expected", "is_exact"),
    [
        # Two ranks of two restarts, and the clean logits that rank the classes.
        (partial(apgd, steps=4, restarts=2, target_ranks=(2, 3)), Passes(21, 20), True),
        # A gradient a class and step.
        (partial(fab, steps=4), Passes(9, 12), True),
        # Proposals that change nothing are not asked about.
        (partial(square, queries=20), Passes(21, 0), False),
    ],
)
def test_passes_are_those_of_a_model_that_nothing_breaks(attack, expected, is_exact):
    calls = Counter()

    def logits_fn(x):
        jax.debug.callback(lambda: calls.update(["forward"]))
        return jnp.array([2.0, 1.0, 0.0]) + 1e-6 * x.reshape(N, -1)[:, :CLASSES]

    x = jnp.linspace(0.2, 0.8, N)[:, None] * jnp.ones((1, 4))
    threat_model = advmeta.ThreatModel("linf", 0.1)
    result = attack(
        logits_fn, x, jnp.zeros(N, int), threat_model=threat_model, key=jax.random.key(0)
    )
    jax.block_until_ready(result.x_adv)
    jax.effects_barrier()
    assert passes(attack, CLASSES) == expected
    assert calls["forward"] == expected.forward or not is_exact
    assert 1 < calls["forward"] <= expected.forward


def test_draws_are_counted_and_foreign_attacks_are_not():
    assert passes(partial(apgd, steps=100, eot_samples=20), 10) == Passes(2020, 2020)
    assert passes(partial(fab, steps=100, target_ranks=(2,)), 10) == Passes(201, 100)
    assert passes(lambda *args, **options: None, 10) is None


def test_an_evaluation_counts_what_each_attack_was_given():
    """Two of four are right; the first attack breaks one of them, so the second is given one."""

    def logits_fn(x):
        return jnp.stack([x[:, 0], jnp.full(len(x), 0.5)], axis=1)

    x = jnp.array([[0.55], [0.9], [0.1], [0.2]])
    attacks = (("fgsm", advmeta.attacks.fgsm), ("square", partial(square, queries=3)))
    result = advmeta.autoattack(
        logits_fn, x, jnp.zeros(4, int), threat_model=advmeta.ThreatModel("linf", 0.1),
        key=jax.random.key(0), version="custom", attacks=attacks,
    )  # fmt: skip
    assert result.robust.tolist() == [False, True, False, False]
    assert result.evaluations == {"square": Passes(4, 0)}


def test_contributions_add_up_along_the_curve():
    """Given at epsilons 0.2 and 0.1; six examples, of which one is wrong as it is."""
    attack = np.array([[0, 1, 2, 2, 1, -1], [0, 1, -1, 2, -1, -1]])
    empty = np.zeros_like(attack)
    points = contributions(Ledger(("clean", "first", "second"), attack, empty, empty), (0.2, 0.1))
    assert points == [
        {"epsilon": 0.2, "robust_accuracy": 1 / 6, "broken_before": 2,
         "broken": {"first": 1, "second": 1}},
        {"epsilon": 0.1, "robust_accuracy": 3 / 6, "broken_before": 0,
         "broken": {"first": 1, "second": 1}},
    ]  # fmt: skip
    (alone,) = contributions(
        Ledger(("clean", "first", "second"), attack[1], empty[1], empty[1]), (0.1,)
    )
    assert alone == points[1]
