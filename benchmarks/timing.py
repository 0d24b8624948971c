"""How everything here is timed: warm-up, turns, medians; and how a result is written."""

import datetime
import json
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable

import jax

from advmeta import environment

RESULTS = pathlib.Path(__file__).parent / "results"


def take_turns(
    contenders: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call, in ``rounds`` rounds in which each contender has one turn.

    A contender must return when its work is done: JAX's with ``block_until_ready``. Turns, and not
    one contender after the other, so that a machine that slows down slows all of them down.
    """
    for run in contenders.values():
        for _ in range(warm_up):
            run()
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def bytes_needed(compiled: jax.stages.Compiled) -> int:
    """Arguments, results and temporaries of a compiled program; what is donated counts once."""
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return needed + memory.output_size_in_bytes - memory.alias_size_in_bytes


def write(question: str, results: dict) -> None:
    """Appends one JSON line to benchmarks/results/QUESTION.jsonl, with commit and hardware."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    line = {
        "question": question,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() + ("-changed" if changed.stdout else ""),
        **environment.describe(),
        **results,
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{question}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
