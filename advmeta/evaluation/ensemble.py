"""AutoAttack (Croce and Hein 2020): an ensemble of attacks that needs no tuning."""

import inspect
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from advmeta.attacks import ThreatModel, average_logits
from advmeta.attacks.losses import is_right
from advmeta.attacks.validation import Note, as_partial, check_attack_inputs
from advmeta.evaluation import ledger as books
from advmeta.evaluation.accounting import Passes, contributions, count_passes
from advmeta.evaluation.ledger import Ledger, State
from advmeta.evaluation.sanity.probes import warn_of_probabilities
from advmeta.evaluation.survivors import Diary, Task, bucket_size, evaluate
from advmeta.evaluation.versions import EOT_SAMPLES, Attacks, attack_list
from advmeta.notebook import html_table
from advmeta.types import Array, Key, LogitsFn


class AutoAttackResult(NamedTuple):
    """What is left after all attacks; with ``epsilons`` arrays have a leading axis for them."""

    x_adv: Array  # [n, ...]: what broke the example, or x where nothing did
    robust: Array  # [n] bool: classified correctly, whatever the attacks tried
    robust_accuracy: float | np.ndarray  # share of the examples that are robust
    clean_accuracy: float  # share of the examples that are classified correctly as they are
    ledger: Ledger  # which attack broke which example, when, and at which distance
    epsilons: np.ndarray | None  # of the curve
    seconds: dict[
        str, float
    ]  # by attack, compilation included; of this call, where one was resumed
    evaluations: dict[str, Passes]  # by attack of the package, at most: see `accounting.passes`
    note: Note  # what was done otherwise than asked, e.g. for want of classes

    def _repr_html_(self) -> str:
        points = contributions(
            self.ledger, (0.0,) if self.epsilons is None else self.epsilons.tolist()
        )
        rows: list[tuple] = [("nothing", "", self.clean_accuracy)]
        for point in points:
            at = "" if self.epsilons is None else f" at epsilon {point['epsilon']:.3g}"
            rows += [(name + at, broken, "") for name, broken in point["broken"].items()]
            rows += [("all" + at, "", point["robust_accuracy"])]
        return html_table(("attack", "breaks", "accuracy"), rows, self.note)


def autoattack(
    logits_fn: LogitsFn,
    x: Array | np.ndarray,
    y: Array | np.ndarray,
    *,
    threat_model: ThreatModel,
    key: Key,
    version: str = "standard",
    batch_size: int = 256,
    attacks: Sequence[Any] | None = None,
    epsilons: Sequence[float] | None = None,
    state_path: str | Path | None = None,
    progress: bool = False,
) -> AutoAttackResult:
    """The share of examples that no attack of the ensemble breaks, and who broke the others.

    ``robust_accuracy = 1/n sum_i min_{attacks a} 1[ argmax f(a(x_i)) = y_i ]``

    "standard" is APGD-CE, APGD-T, FAB-T and Square (in l1 with five restarts of APGD-CE and five
    targets of APGD-T instead of one and nine); "plus" has restarts and untargeted forms as
    well; "rand", for models that draw random numbers, is APGD-CE and APGD-DLR with 20 draws a
    gradient. An adversarial example counts if the model, asked again, misclassifies it and it is in
    the threat model.

    Every example draws from its own keys, so results depend neither on the batch size nor on the
    order of the examples, up to the rounding of products of other shapes.

    Args:
      logits_fn: x [n, ...] -> logits [n, k]; for "rand" (x [n, ...], key) -> logits [n, k], whose
        prediction is that of its mean logits over 20 draws.
      x: examples [n, ...], in the threat model's bounds.
      y: true labels [n].
      threat_model: the ball; its epsilon may be [n].
      key: for all random starts and proposals.
      version: "standard", "plus", "rand" or "custom".
      batch_size: how many examples are attacked at once, at most.
      attacks: for "custom", names ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square") or
        pairs (name, attack) with attack(logits_fn, x, y, threat_model=..., key=...) ->
        `AttackResult`.
      epsilons: evaluate at each of these instead of at threat_model.epsilon. What breaks an example
        at one of them counts at all larger ones, where it is not attacked again: so robust accuracy
        falls with epsilon, example by example.
      state_path: a file to keep the progress in. A call with the same arguments takes it up and
        ends with the result of an uninterrupted one.
      progress: show a progress bar.

    Returns:
      `AutoAttackResult`.

    Raises:
      ValueError: labels that do not fit, images out of bounds or NaN, no examples, a logits_fn with
        another batch size, epsilon beyond the width of the bounds, an unknown version or attack, or
        a state of another evaluation.

    Example:
      >>> logits_fn = lambda x: jnp.stack([x[:, 0], x[:, 1]], axis=1)
      >>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1], [0.1, 0.9]]), jnp.array([0, 0, 0])
      >>> result = advmeta.autoattack(
      ...     logits_fn, x, y, threat_model=advmeta.ThreatModel("linf", epsilon=0.1),
      ...     key=jax.random.key(0), version="custom", attacks=("apgd-ce", "fab"))
      >>> result.robust.tolist()  # the margins are 0.1, 0.8 and -0.8; 0.2 is the most it can move
      [False, True, False]
      >>> result.ledger.names().tolist()
      ['apgd-ce', '', 'clean']

    Reference:
      Croce and Hein 2020, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
      Parameter-free Attacks. arXiv:2003.01690; for l1 Croce and Hein 2021, Mind the Box: l1-APGD
      for Sparse Adversarial Attacks on Image Classifiers, section 4. arXiv:2103.01208
    """
    model, classify, x, y, radii = check_evaluation(
        logits_fn, x, y, threat_model=threat_model, key=key, version=version,
        batch_size=batch_size, epsilons=epsilons,
    )  # fmt: skip
    logits = _clean_logits(classify, x, batch_size)
    warn_of_probabilities(logits)
    attacks, note = attack_list(version, logits.shape[1], attacks, norm=threat_model.norm)
    task = Task(model, classify, x, y, threat_model, attacks, _run_keys(key, attacks), batch_size)
    identity = books.fingerprint(x, y, logits, threat_model, radii, key, attacks)
    diary = Diary(None if state_path is None else Path(state_path), identity)
    order = np.argsort([r.max() for r in radii], kind="stable")
    radii = [radii[i] for i in order]
    is_correct = np.asarray(is_right(jnp.asarray(logits), jnp.asarray(y)))
    states, seconds, notes = evaluate(task, radii, diary, is_correct, progress)
    evaluations = count_passes(states, radii, is_correct, attacks, logits.shape[1])
    states = [states[i] for i in np.argsort(order)]
    if lost := np.isnan(logits).any(axis=1).sum():
        notes.append(f"the logits of {lost} of {len(x)} examples are NaN: they count as wrong")
    note = Note("; ".join(dict.fromkeys(filter(None, [note, *notes]))))
    clean_accuracy = float(is_correct.mean())
    return _result(states, attacks, epsilons, clean_accuracy, seconds, evaluations, note)


def check_evaluation(
    logits_fn: LogitsFn, x, y, *, threat_model: ThreatModel, key: Key, version: str,
    batch_size: int, epsilons: Sequence[float] | None,
) -> tuple[Partial, Partial, np.ndarray, np.ndarray, list[np.ndarray]]:  # fmt: skip
    """Raises the ValueErrors of `autoattack` that need no pass of the model.

    Returns:
      The model as attacks see it, and as a function of x alone; x and y on the host; and the
      epsilon of every example [n], for each point of the curve.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    model, classify = _two_views(logits_fn, version, key)
    x, y = (np.asarray(v) for v in check_attack_inputs(classify, x, y, threat_model))
    return model, classify, x, y, _radii(threat_model, epsilons, x)


@jax.jit
def _logits(classify: Partial, x: Array) -> Array:
    return classify(x)


def _clean_logits(classify: Partial, x: np.ndarray, batch_size: int) -> np.ndarray:
    parts = []
    for start in range(0, len(x), batch_size):
        part = x[start : start + batch_size]
        index = np.resize(np.arange(len(part)), bucket_size(len(part), batch_size))
        parts.append(np.asarray(_logits(classify, jnp.asarray(part[index])))[: len(part)])
    return np.concatenate(parts)


def _two_views(logits_fn: LogitsFn, version: str, key: Key) -> tuple[Partial, Partial]:
    """The model as attacks see it, and as a function of x alone."""
    model = as_partial(logits_fn)
    needed = 2 if version == "rand" else 1
    try:
        inspect.signature(logits_fn).bind(*range(needed))
    except TypeError as error:
        raise ValueError(
            f"logits_fn cannot be called with {needed} argument(s) ({error}): version='rand' is "
            "for models (x, key) -> logits that draw random numbers, the others for x -> logits"
        ) from error
    if version != "rand":
        return model, model
    return model, average_logits(model, jax.random.fold_in(key, 0), EOT_SAMPLES)


def _run_keys(key: Key, attacks: Attacks) -> list[Key]:
    """Made from the attack's name and a count, so that every list gives an attack the same keys."""
    seen, keys = Counter(), []
    for name, _ in attacks:
        keys.append(
            jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), seen[name])
        )
        seen[name] += 1
    return keys


def _radii(threat_model: ThreatModel, epsilons, x: np.ndarray) -> list[np.ndarray]:
    """The epsilon of every example [n], for each point of the curve."""
    given = [threat_model.epsilon] if epsilons is None else list(epsilons)
    if not given:
        raise ValueError("epsilons=[] asks for no evaluation; name at least one epsilon")
    widest = threat_model.widest(x[0].size)
    radii = []
    for epsilon in given:
        radius = np.asarray(epsilon, np.float32)
        if epsilons is not None and radius.ndim:
            raise ValueError(f"epsilons={epsilons!r} must hold numbers, one a point of the curve")
        if not (np.isfinite(radius).all() and (radius >= 0).all()):
            raise ValueError(f"epsilon={epsilon!r} must be finite and at least 0")
        if radius.max() > widest * (1 + 1e-6):
            raise ValueError(
                f"epsilon={radius.max():g} is wider than the bounds {threat_model.bounds} "
                f"({threat_model.norm}: {widest:g}): every image would be allowed. Epsilon is in "
                "the units of x: for images in [0, 1] write 8 / 255, not 8"
            )
        radii.append(np.broadcast_to(radius, len(x)))
    return radii


def _result(
    states: list[State], attacks, epsilons, clean_accuracy, seconds, evaluations, note
) -> AutoAttackResult:
    names = ("clean", *dict.fromkeys(name for name, _ in attacks))
    # The last entry is for the run number -1 of what is robust.
    attack_of_run = [0, *(names.index(name) for name, _ in attacks), books.ROBUST]
    stack = np.stack if epsilons is not None else (lambda arrays: arrays[0])
    run, robust = stack([s.run for s in states]), stack([s.robust for s in states])
    book = Ledger(
        names,
        np.array(attack_of_run, np.int32)[run],
        run,
        stack([s.distance for s in states]),
    )
    accuracy = robust.mean(axis=-1)
    return AutoAttackResult(
        jnp.asarray(stack([s.x_adv for s in states])),
        jnp.asarray(robust),
        float(accuracy) if epsilons is None else accuracy,
        clean_accuracy,
        book,
        None if epsilons is None else np.asarray(epsilons, np.float32),
        seconds,
        evaluations,
        note,
    )
