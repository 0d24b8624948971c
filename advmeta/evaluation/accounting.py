"""What an evaluation cost, and what each attack contributed to it."""

import functools
import inspect
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from advmeta.attacks import apgd, fab, square
from advmeta.evaluation.ledger import ROBUST, Ledger, State
from advmeta.evaluation.versions import Attack, Attacks


class Passes(NamedTuple):
    """How often a model is run on one example."""

    forward: int
    backward: int


def passes(attack: Attack, classes: int) -> Passes | None:
    """What a run of an attack may ask of the model for one example; None for a foreign attack.

    A batch of which every example is broken stops early, and Square passes over proposals that
    change nothing: so this is an upper bound.

    Args:
      attack: `advmeta.attacks.apgd`, `fab` or `square`, with its options in a `functools.partial`.
      classes: of the model.

    Example:
      >>> import functools
      >>> from advmeta.evaluation.accounting import passes
      >>> passes(functools.partial(advmeta.attacks.apgd, steps=100), classes=10)
      Passes(forward=101, backward=101)
    """
    given = attack.keywords if isinstance(attack, functools.partial) else {}
    attack = attack.func if isinstance(attack, functools.partial) else attack
    if attack not in (apgd, fab, square):
        return None
    defaults = {name: p.default for name, p in inspect.signature(attack).parameters.items()}
    options = defaults | given
    ranks = options.get("target_ranks")
    runs = options["restarts"] * (1 if ranks is None else len(ranks))
    if attack is square:  # the start, and every query
        return Passes(runs * (options["queries"] + 1), 0)
    if attack is apgd:  # the start, and every step; the clean logits rank the targets
        a_run = (options["steps"] + 1) * (options["eot_samples"] or 1)
        return Passes(runs * a_run + (ranks is not None), runs * a_run)
    # Without a target, a plane for every class is pulled back. The clean logits come first.
    planes = classes if ranks is None else 1
    return Passes(runs * 2 * options["steps"] + 1, runs * options["steps"] * planes)


def count_passes(
    states: Sequence[State], radii: Sequence[np.ndarray], is_correct: np.ndarray, attacks: Attacks,
    classes: int,
) -> dict[str, Passes]:  # fmt: skip
    """By attack, what `passes` allows for the examples that it was given, at all radii.

    Args:
      states: the final ones, at rising radii.
      radii: the epsilon of every example [n], for each state.
      is_correct: [n] bool, whether an example is classified as its label.
      attacks: names with attacks, one entry a run.
      classes: of the model.
    """
    totals, left = {}, is_correct
    for state, radius in zip(states, radii, strict=True):
        for run, (name, attack) in enumerate(attacks, start=1):
            each = passes(attack, classes)
            if each is not None:
                given = left & (radius > 0) & (state.robust | (state.run >= run))
                before = totals.get(name, Passes(0, 0))
                more = (int(given.sum()) * count for count in each)
                totals[name] = Passes(*map(operator.add, before, more))
        left = state.robust
    return totals


def contributions(ledger: Ledger, epsilons: Sequence[float]) -> list[dict]:
    """Who broke how many at each epsilon, as JSON can hold it.

    Args:
      ledger: of `advmeta.autoattack`, with or without an axis for the epsilons.
      epsilons: of its rows.

    Returns:
      A dict for each epsilon, in their order: epsilon, robust_accuracy, "broken" with a number for
      each attack, and "broken_before", those broken at a smaller epsilon: they were not attacked
      again.
    """
    rows = np.atleast_2d(ledger.attack)
    points, before = [{}] * len(rows), np.full(rows.shape[1], ROBUST)
    for place in np.argsort(epsilons, kind="stable"):
        row = rows[place]
        new = row[before == ROBUST]
        points[place] = {
            "epsilon": float(epsilons[place]),
            "robust_accuracy": float((row == ROBUST).mean()),
            "broken_before": int((before > 0).sum()),
            "broken": {
                name: int((new == i).sum()) for i, name in enumerate(ledger.attacks) if i > 0
            },
        }
        before = row
    return points
