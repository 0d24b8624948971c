"""What is known about every example in the course of an evaluation, and how it is kept on disk."""

import dataclasses
import functools
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from advmeta.attacks.threat_model import ThreatModel

FORMAT = 1  # of the state file
ROBUST = -1  # in `Ledger.attack` and `Ledger.run`


class Ledger(NamedTuple):
    """For each example, what broke it; numpy arrays [n], or [epsilons, n] for a curve."""

    attacks: tuple[str, ...]  # "clean", then the attacks in their order
    attack: np.ndarray  # int32, index into ``attacks``; 0 if misclassified as it is, -1 if robust
    run: np.ndarray  # int32, when: the number of the run (0 = clean, 1, ...), or -1
    distance: np.ndarray  # float32, the norm of x_adv - x; inf if robust

    def names(self) -> np.ndarray:
        """The name of the attack that broke each example, "" for none."""
        return np.array([*self.attacks, ""])[self.attack]


@dataclasses.dataclass
class State:
    """The arrays that an evaluation fills in, at one epsilon; only ever on the host."""

    run: np.ndarray  # [n] int32, as in `Ledger`
    distance: np.ndarray  # [n] float32
    x_adv: np.ndarray  # [n, ...]
    attacked: np.ndarray  # [n] bool: by the current run
    current: int = 1  # the current run
    current_epsilon: int = 0

    @classmethod
    def fresh(cls, x: np.ndarray) -> "State":
        n = x.shape[0]
        return cls(
            np.full(n, ROBUST, np.int32), np.full(n, np.inf, np.float32), x.copy(),
            np.zeros(n, bool),
        )  # fmt: skip

    @property
    def robust(self) -> np.ndarray:
        return self.run == ROBUST

    def record(self, index: np.ndarray, x_adv: np.ndarray, distance, run: int) -> None:
        """Marks the examples ``index`` as broken by a run."""
        self.run[index], self.distance[index], self.x_adv[index] = run, distance, x_adv


class Fingerprint(NamedTuple):
    """What must be the same for a state to be taken up again."""

    settings: str  # hash of examples, labels, threat model, key and attacks
    logits: np.ndarray  # [n, k] clean logits; they stand for the model


def fingerprint(x, y, logits, threat_model: ThreatModel, epsilons, key, attacks) -> Fingerprint:
    """What makes an evaluation this one. The batch size does not: results do not depend on it."""
    digest = hashlib.sha256()
    words = [
        str(FORMAT), threat_model.norm, repr(threat_model.bounds), str(x.shape), str(x.dtype),
        *(f"{name}={describe(attack)}" for name, attack in attacks),
    ]  # fmt: skip
    arrays = [x, y, np.asarray(epsilons, np.float32), np.asarray(jax.random.key_data(key))]
    for part in [*(word.encode() for word in words), *(np.asarray(a).tobytes() for a in arrays)]:
        digest.update(len(part).to_bytes(8, "big") + part)
    return Fingerprint(digest.hexdigest(), np.asarray(logits))


def describe(value) -> str:
    """A function and its options in words that are the same in every process."""
    if isinstance(value, functools.partial):
        options = [f"{k}={describe(v)}" for k, v in sorted(value.keywords.items())]
        return f"{describe(value.func)}({', '.join([*map(describe, value.args), *options])})"
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"{getattr(value, '__module__', '')}.{name}"
    return repr(value)


def save(path: Path, done: Sequence[State], state: State, identity: Fingerprint) -> None:
    """Writes all states, those of finished epsilons first, as one npz of plain arrays.

    Under another name first: whoever is interrupted here keeps the last complete file.
    """
    states = [*done, state]
    broken = [~s.robust for s in states]
    arrays: dict[str, Any] = {
        "format": np.array(FORMAT),
        "settings": np.array(identity.settings),
        "logits": identity.logits,
        "run": np.stack([s.run for s in states]),
        "distance": np.stack([s.distance for s in states]),
        # The others are still as they came.
        "x_adv": np.concatenate([s.x_adv[b] for s, b in zip(states, broken, strict=True)]),
        "attacked": state.attacked,
        "current": np.array([state.current, state.current_epsilon]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: Path, x: np.ndarray, identity: Fingerprint) -> tuple[list[State], State]:
    """The states of an interrupted evaluation, finished epsilons and the current one.

    Raises:
      ValueError: the file is of another evaluation, or is no state file.
    """
    advice = "give another state_path, or delete the file to start over"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        settings, logits = str(arrays["settings"]), arrays["logits"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a state of autoattack ({error}); {advice}") from error
    if settings != identity.settings:
        raise ValueError(
            f"{path} belongs to an evaluation with other examples, labels, threat model, epsilons, "
            f"key or attacks; {advice}"
        )
    # Another machine rounds otherwise; another model differs by more.
    if not np.allclose(logits, identity.logits, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(f"{path} belongs to an evaluation of another model; {advice}")
    states, start = [], 0
    for run, distance in zip(arrays["run"], arrays["distance"], strict=True):
        state = State(run, distance, x.copy(), np.zeros(len(x), bool))
        count = int((~state.robust).sum())
        state.x_adv[~state.robust] = arrays["x_adv"][start : start + count]
        states, start = [*states, state], start + count
    current = states[-1]
    current.attacked = arrays["attacked"]
    current.current, current.current_epsilon = (int(v) for v in arrays["current"])
    return states[:-1], current
