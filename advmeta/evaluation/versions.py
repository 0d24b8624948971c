"""The attacks of each version of AutoAttack, in the reference's order and with its budgets."""

from collections.abc import Callable
from functools import partial

from advmeta.attacks import apgd, fab, square
from advmeta.attacks.validation import AttackResult, Note

Attack = Callable[..., AttackResult]  # (logits_fn, x, y, *, threat_model, key) -> AttackResult
Attacks = tuple[tuple[str, Attack], ...]

VERSIONS = ("standard", "plus", "rand", "custom")
TARGETS = 9  # classes that the targeted attacks try, the strongest first
L1_TARGETS = 5  # of those, the ones that APGD-T tries in l1
RESTARTS = 5  # in "plus", and of APGD-CE in l1
EOT_SAMPLES = 20  # in "rand"


def attack_list(
    version: str, classes: int, custom=None, *, norm: str = "linf"
) -> tuple[Attacks, Note]:
    """The attacks of a version as a tuple of (name, attack), one entry a run.

    Runs are kept apart, so that what one of them breaks is left out of the next: an attack with
    nine targets or five restarts is nine or five entries of the same name.

    Args:
      version: one of `VERSIONS`.
      classes: of the model; with less than ten there are fewer targets.
      custom: for "custom", names of known attacks or pairs (name, attack).
      norm: of the threat model. In l1 "standard" has five restarts of APGD-CE and five targets of
        APGD-T.

    Returns:
      The list, and a note where it falls short of the reference's for want of classes.

    Raises:
      ValueError: an unknown version or name, or a custom list without version "custom".

    Example:
      >>> from advmeta.evaluation.versions import attack_list
      >>> attacks, _ = attack_list("standard", classes=10)
      >>> list(dict.fromkeys(name for name, _ in attacks)), len(attacks)
      (['apgd-ce', 'apgd-t', 'fab-t', 'square'], 20)

    Reference:
      Croce and Hein 2020, section 5. arXiv:2003.01690; for l1 Croce and Hein 2021, section 4.
      arXiv:2103.01208; fra31/auto-attack.
    """
    if version not in VERSIONS:
        raise ValueError(f"version={version!r} is unknown; the known ones are {list(VERSIONS)}")
    if (version == "custom") != (custom is not None):
        raise ValueError(
            f"version={version!r} with attacks={custom!r}: give attacks=('apgd-ce', ...) or pairs "
            "(name, attack) together with version='custom', and only there"
        )
    if classes < 2:
        raise ValueError(f"the model has {classes} class: there is nothing to misclassify it as")
    known = known_attacks(classes)
    restarts, targets = (RESTARTS, L1_TARGETS) if norm == "l1" else (1, TARGETS)
    attacks = {
        "standard": (
            known["apgd-ce"] * restarts
            + known["apgd-t"][:targets]
            + known["fab-t"]
            + known["square"]
        ),
        "plus": (
            known["apgd-ce"] * RESTARTS
            + known["apgd-dlr"] * RESTARTS
            # FAB's later restarts start from what the earlier ones found, so they stay together.
            + (("fab", partial(fab, restarts=RESTARTS, stop_at_epsilon=True)),)
            + known["square"]
            + known["apgd-t"]
            + known["fab-t"]
        ),
        "rand": tuple(
            (f"apgd-{loss}", partial(apgd, loss=loss, eot_samples=EOT_SAMPLES))
            for loss in ("ce", "dlr")
        ),
        "custom": tuple(run for entry in custom or () for run in _runs(entry, known)),
    }[version]
    if not attacks:
        raise ValueError("attacks=() is an empty list; name at least one, as in ('apgd-ce',)")
    targeted = any(name in ("apgd-t", "fab-t") for name, _ in attacks)
    if targeted and classes <= TARGETS:
        return attacks, Note(
            f"the model has {classes} classes: {classes - 1} targets instead of {TARGETS}"
        )
    return attacks, Note()


def known_attacks(classes: int) -> dict[str, Attacks]:
    """The attacks that have names."""
    ranks = range(2, min(classes, TARGETS + 1) + 1)

    def apgd_t(rank):
        return partial(apgd, loss="dlr", target_ranks=(rank,))

    def fab_t(rank):
        # An example that one target breaks needs no nearer point from another.
        return partial(fab, target_ranks=(rank,), stop_at_epsilon=True)

    return {
        "apgd-ce": (("apgd-ce", partial(apgd, loss="ce")),),
        "apgd-dlr": (("apgd-dlr", partial(apgd, loss="dlr")),),
        "apgd-t": tuple(("apgd-t", apgd_t(rank)) for rank in ranks),
        "fab": (("fab", partial(fab, stop_at_epsilon=True)),),
        "fab-t": tuple(("fab-t", fab_t(rank)) for rank in ranks),
        "square": (("square", square),),
    }


def _runs(entry, known: dict[str, Attacks]) -> Attacks:
    if isinstance(entry, str):
        if entry not in known:
            raise ValueError(f"there is no attack {entry!r}; the known ones are {list(known)}")
        return known[entry]
    if not (isinstance(entry, tuple) and len(entry) == 2 and callable(entry[1])):
        raise ValueError(
            f"{entry!r} is no attack: write a name such as 'apgd-ce' or a pair (name, attack), "
            "where attack is called as attack(logits_fn, x, y, threat_model=..., key=...)"
        )
    return (entry,)
