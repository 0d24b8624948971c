"""The loop of an evaluation: every attack gets what the ones before it failed to break.

Results are kept on the host; compiled code sees batches of a few sizes.
"""

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from advmeta.attacks.losses import is_right
from advmeta.attacks.threat_model import ThreatModel
from advmeta.evaluation import ledger
from advmeta.evaluation.ledger import State
from advmeta.evaluation.versions import Attacks
from advmeta.types import Array, Key

SAVE_SECONDS = 30  # at most so much work within a run is lost when the process is killed


class Task(NamedTuple):
    """What stays the same throughout."""

    logits_fn: Partial  # what attacks get
    classify: Partial  # what decides about success: x -> logits
    x: np.ndarray
    y: np.ndarray
    threat_model: ThreatModel
    attacks: Attacks
    keys: list[Key]  # one a run
    batch_size: int


class Diary:
    """Where the progress is kept, if anywhere."""

    def __init__(self, path: Path | None, identity: ledger.Fingerprint):
        self.path, self.identity, self.last = path, identity, time.monotonic()

    def read(self, x: np.ndarray) -> tuple[list[State], State] | None:
        if self.path is None or not self.path.exists():
            return None
        return ledger.load(self.path, x, self.identity)

    def write(self, done: list[State], state: State, *, now: bool) -> None:
        if self.path is None or not (now or time.monotonic() - self.last > SAVE_SECONDS):
            return
        ledger.save(self.path, done, state, self.identity)
        self.last = time.monotonic()


def evaluate(task: Task, radii, diary: Diary, is_correct, progress):
    """The states at each of the rising radii, the seconds by attack, and the attacks' notes."""
    done, state = diary.read(task.x) or ([], State.fresh(task.x))
    clean_errors = np.flatnonzero(~is_correct & state.robust)
    state.record(clean_errors, task.x[clean_errors], np.float32(0), 0)
    seconds, notes = defaultdict(float), {}
    with _bar(progress, len(radii) * len(task.attacks)) as show:
        try:
            while True:
                radius = radii[state.current_epsilon]
                for run in range(state.current, len(task.attacks) + 1):
                    name = task.attacks[run - 1][0]
                    started = time.monotonic()
                    for share in _one_run(task, state, run, radius, notes):
                        diary.write(done, state, now=False)
                        before = state.current_epsilon * len(task.attacks) + run - 1
                        show(name, before + share, state.robust.mean())
                    seconds[name] += time.monotonic() - started
                    state.attacked[:], state.current = False, run + 1
                    diary.write(done, state, now=True)
                if state.current_epsilon + 1 == len(radii):
                    return [*done, state], dict(seconds), list(notes)
                done, state = [*done, state], dataclasses.replace(
                    state, run=state.run.copy(), distance=state.distance.copy(),
                    x_adv=state.x_adv.copy(), attacked=state.attacked.copy(),
                    current=1, current_epsilon=state.current_epsilon + 1,
                )  # fmt: skip
        except BaseException:
            # Batches are whole or not at all in the state, so it can be taken up from here.
            diary.write(done, state, now=True)
            raise


def _one_run(task: Task, state: State, run: int, radius: np.ndarray, notes) -> Iterator[float]:
    """Attacks all that is robust so far, batch by batch; yields the share that is done."""
    name, attack = task.attacks[run - 1]
    todo = np.flatnonzero(state.robust & ~state.attacked & (radius > 0))
    for start in range(0, len(todo), task.batch_size):
        members = todo[start : start + task.batch_size]
        padded = np.resize(members, bucket_size(len(members), task.batch_size))
        x, y = jnp.asarray(task.x[padded]), jnp.asarray(task.y[padded])
        # Always an array, so that all radii share one compiled program.
        ball = dataclasses.replace(task.threat_model, epsilon=jnp.asarray(radius[padded]))
        result = attack(task.logits_fn, x, y, threat_model=ball, key=task.keys[run - 1])
        if note := getattr(result, "note", ""):
            notes[f"{name}: {note}"] = None
        verdict = _judge(task.classify, ball, x, y, result.x_adv)
        broken, distance, is_outside = (np.asarray(v)[: len(members)] for v in verdict)
        if is_outside.any():
            notes[f"{name}: left the threat model on some examples, which do not count"] = None
        x_adv = np.asarray(result.x_adv)[: len(members)]
        state.record(members[broken], x_adv[broken], distance[broken], run)
        state.attacked[members] = True
        yield (start + len(members)) / len(todo)


def bucket_size(n: int, batch_size: int) -> int:
    """The size that a batch of n is padded to: one of eight, so that compilations are few."""
    step = max(-(-batch_size // 8), 8)
    return min(-(-n // step) * step, batch_size)


@jax.jit
def _judge(classify: Partial, ball: ThreatModel, x: Array, y: Array, x_adv: Array):
    """Which x_adv count, how far they are, and which would count but for where they are; [n]."""
    distance = ball.distance(x, x_adv)
    # The slack is for rounding: (x + epsilon) - x is not epsilon.
    is_near = distance <= jnp.asarray(ball.epsilon) * (1 + 1e-4) + 1e-6
    axes = tuple(range(1, x.ndim))
    in_bounds = ((x_adv >= ball.bounds[0]) & (x_adv <= ball.bounds[1])).all(axis=axes)
    is_fooled = ~is_right(classify(x_adv), y)
    # NaN fails both comparisons.
    return is_fooled & is_near & in_bounds, distance, is_fooled & ~(is_near & in_bounds)


@contextlib.contextmanager
def _bar(progress: bool, runs: int):
    """Yields a function (attack, runs done, share robust) that shows where the evaluation is."""
    if not progress:
        yield lambda *_: None
        return
    from rich.progress import Progress  # only here: it takes a while to import

    with Progress() as bar:
        task = bar.add_task("autoattack", total=runs)
        yield lambda name, done, robust: bar.update(
            task, completed=done, description=f"{name}: {robust:.1%} robust"
        )
