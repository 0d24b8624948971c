"""`advmeta meta-train`, and the first half of `advmeta run`: a meta-training to take up again."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import pathlib
import signal
import time
from collections.abc import Iterator

import jax
from rich.console import Console

from advmeta import config_files, environment, processes
from advmeta.checkpoint import Checkpoints, Restored
from advmeta.event_log import event_log
from advmeta.meta_optimizer.weights import load_weights, save_weights
from advmeta.meta_training import TrainingState, training_states
from advmeta.meta_training_config import MetaTrainingConfig
from advmeta.progress import MetaTrainingProgress
from advmeta.run_folder import Resumable, differences, replace_file
from advmeta.types import MetaParams, PyTree

WEIGHTS = "meta_optimizer.safetensors"
_FINISHED = "finished"


@dataclasses.dataclass(frozen=True)
class Training(Resumable):
    """Options of the commands that meta-train.

    Args:
      training: what decides the weights, with the seed.
      checkpoint_seconds: of work that a kill may cost; 0 keeps every report.
      tensorboard: write event files too; it needs the extra advmeta[tensorboard].
    """

    training: MetaTrainingConfig = MetaTrainingConfig()
    checkpoint_seconds: float = 30.0
    tensorboard: bool = False

    def __post_init__(self):
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "--tensorboard needs a package that is not here: pip install 'advmeta[tensorboard]'"
            )


@dataclasses.dataclass(frozen=True)
class MetaTrain(processes.Processes, Training):
    """Meta-train an optimizer and write its weights.

    A run that was killed goes on with --resume, to the very weights that it would have had. Several
    devices, and several processes on one host or many, share the lanes of every task.

    Example: advmeta meta-train --output runs/mine --training.learning-rate 2e-3
    """

    def __post_init__(self):
        Training.__post_init__(self)
        processes.Processes.__post_init__(self)
        if (self.num_processes or 1) > self.training.lanes:
            raise ValueError(
                f"num_processes={self.num_processes} is more than training.lanes="
                f"{self.training.lanes}, and each process needs one at least: write "
                f"--training.lanes {self.num_processes}, or start fewer"
            )


def train_and_save(
    command: Training, line: str, folder: pathlib.Path, console: Console
) -> MetaParams:
    """Meta-trains from the newest checkpoint, if there is one; writes the weights and their card.

    ``line`` is what was typed. The folder gets metrics.jsonl, a line a record; event files if they
    are asked for; checkpoints; and, last, the weights and card.json.

    Raises:
      SystemExit: SIGINT or SIGTERM came; there is a checkpoint of where it stood, and the best
        weights so far.
      ValueError: there are checkpoints, and none is whole.
    """
    config = command.training
    finished = (folder / "card.json").exists()
    processes.said_by_first(_FINISHED if finished else "")
    if finished:
        return load_weights(folder / WEIGHTS)[0]
    metrics: list[dict] = []
    made_by = {"seed": command.seed, "training": json.loads(config_files.to_json(config))}
    about = {"name": folder.name, "command": line, **made_by, **environment.describe()}
    with (
        Checkpoints(folder / "checkpoints") as checkpoints,
        MetaTrainingProgress(config, console) as bar,
        _signals() as signals,
    ):
        start = functools.partial(_take_up, checkpoints, made_by, metrics, console)
        states = _states(command, start)
        state = next(states)
        for record in metrics:
            bar.update(record)
        saved = time.monotonic()
        for state in _logged(states, metrics, folder, command.tensorboard):
            bar.update(metrics[-1])
            arrays, came = _pause(command, state, saved, signals)
            if arrays is not None:
                record = {"made_by": made_by, "metrics": list(metrics)}
                checkpoints.save(metrics[-1]["outer_step"], arrays, record)
                saved = time.monotonic()
            if came:
                stopped = {"stopped_after": metrics[-1]["outer_step"]}
                kept = _save_best(state, folder, {**about, **stopped}, metrics, config)
                console.print(
                    f"{signal.Signals(came).name}: stopped after outer step "
                    f"{stopped['stopped_after']}; --resume --output {folder} goes on from there"
                    + (f". The best weights so far: {folder / WEIGHTS}" if kept else ""),
                    markup=False,
                )
                raise SystemExit(128 + came)
    card = _save_best(state, folder, about, metrics, config)
    replace_file(folder / "card.json", (json.dumps(card, indent=2) + "\n").encode())
    return state.best


def _save_best(
    state: TrainingState,
    folder: pathlib.Path,
    about: dict,
    metrics: list[dict],
    config: MetaTrainingConfig,
) -> dict | None:
    """Writes the best weights so far; returns their card, or None where none were judged yet."""
    judged = [record for record in metrics if "robust_accuracy" in record]
    if not judged:
        return None
    selected_at = max(judged, key=lambda record: record["robust_accuracy"])
    card = {**about, "seconds": metrics[-1]["seconds"], "selected_at": selected_at}
    save_weights(folder / WEIGHTS, state.best, config.meta_optimizer, **card)
    return card


def take_part(command: Training) -> None:
    """What the other processes do while process 0 is in `train_and_save`, call by call.

    Raises:
      SystemExit: a signal came to any of the processes.
    """
    if processes.said_by_first() == _FINISHED:
        return
    with _signals() as signals:
        states = _states(command, _shared)
        next(states)
        saved = time.monotonic()
        for state in states:
            arrays, came = _pause(command, state, saved, signals)
            if arrays is not None:
                saved = time.monotonic()
            if came:
                raise SystemExit(128 + came)


def _states(command: Training, start) -> Iterator[TrainingState]:
    config = command.training
    mesh = processes.device_mesh(config.lanes)
    return training_states(config, key=jax.random.key(command.seed), mesh=mesh, start=start)


def _pause(
    command: Training, state: TrainingState, saved: float, signals: list[int]
) -> tuple[PyTree | None, int]:
    """Agrees with the other processes on what to do between two reports.

    Returns:
      The state's arrays if there is to be a checkpoint, and a signal to stop for; 0 is none.
    """
    due = time.monotonic() - saved >= command.checkpoint_seconds
    due, came = processes.highest(due, signals[0] if signals else 0).tolist()
    *arrays, _ = state
    return (processes.to_host(arrays) if due or came else None), came


def _shared(fresh: TrainingState, found: Restored | None = None) -> TrainingState:
    """The state that process 0 found, on every process; or the fresh one."""
    *arrays, _ = fresh
    metrics = json.loads(processes.said_by_first(json.dumps(found and found.record["metrics"])))
    if metrics is None:
        return fresh
    history = ({k: v for k, v in record.items() if k != "seconds"} for record in metrics)
    outer, best, best_robust = processes.given_by_first(found.arrays if found else arrays)
    return TrainingState(outer, best, best_robust, tuple(history))


def _take_up(
    checkpoints: Checkpoints, made_by: dict, metrics: list[dict], console: Console,
    fresh: TrainingState,
) -> TrainingState:  # fmt: skip
    """The state of the newest whole checkpoint, whose records go into ``metrics``; or the fresh.

    Raises:
      ValueError: it was written by a run with another seed or configuration.
    """
    *arrays, _ = fresh
    found = checkpoints.newest(arrays)
    if found is None:
        return _shared(fresh)
    for damage in found.damaged:
        console.print(f"passed over a damaged checkpoint, {damage}", style="yellow", markup=False)
    if differing := differences(found.record["made_by"], made_by):
        raise ValueError(
            f"the checkpoint in {checkpoints.folder} is of a run with {'; '.join(differing)}: give "
            "the same options, or another --output"
        )
    metrics.extend(found.record["metrics"])
    return _shared(fresh, found)


def _logged(
    states: Iterator[TrainingState], metrics: list[dict], folder: pathlib.Path, tensorboard: bool
) -> Iterator[TrainingState]:
    """Adds each state's record, with the seconds so far, to ``metrics`` and to the logs.

    The logs hold what ``metrics`` held, and nothing that came after it in a run that was killed.
    """
    path = folder / "metrics.jsonl"
    replace_file(path, "".join(json.dumps(record) + "\n" for record in metrics).encode())
    began = time.perf_counter() - (metrics[-1]["seconds"] if metrics else 0.0)
    no_events = contextlib.nullcontext(lambda record: None)
    events = event_log(folder / "tensorboard", metrics) if tensorboard else no_events
    with path.open("a") as lines, events as add_event:
        for state in states:
            seconds = round(time.perf_counter() - began, 3)
            metrics.append({**state.history[-1], "seconds": seconds})
            lines.write(json.dumps(metrics[-1]) + "\n")
            lines.flush()
            add_event(metrics[-1])
            yield state


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are collected, so that the run can leave when it is between two steps."""
    came: list[int] = []
    both = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.signal(each, lambda number, frame: came.append(number)) for each in both}
    try:
        yield came
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
