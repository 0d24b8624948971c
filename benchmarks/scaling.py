"""How do time and memory grow with the episode, the truncation and the tasks?

    python -m benchmarks.scaling

Digits and an MLP 64-20-10 (1,510 parameters), the shipped configuration. An episode is
`advmeta.train` with fresh weights; meta-training is `advmeta.outer_step.outer_steps` with PGD on
held-out examples, an episode of 20 inner steps after the other. Memory is what the compiled program
says that it needs: arguments, results and temporaries. Compiling is timed at the first call. Tasks
are counted with backpropagation and with evolution strategies, the default. The last rows are one
outer step of LSTMs of the default size, (8,), and of the size of the published one, (20, 20), with
their memory in bfloat16, and without recomputing steps in the backward pass.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import optax
from rich.console import Console
from rich.table import Table

import advmeta
from advmeta import outer_step
from advmeta.meta_loss import MetaLossConfig
from advmeta.meta_optimizer import MetaOptimizerConfig, init_meta_params, scale_by_meta_optimizer
from advmeta.meta_training_config import MetaTrainingConfig
from advmeta.task_families import TaskConfig
from benchmarks import timing

EPISODES = (20, 200, 2000)
TRUNCATIONS = (20, 40, 80)
LANES = (1, 8, 64)
CONFIG = MetaTrainingConfig(
    tasks=(TaskConfig(),), lanes=1, truncation=20, horizon=(200, 200), estimator="backpropagation",
    meta_loss=MetaLossConfig(attack_steps=5, every=1, examples=128, loss="calibrated"),
)  # fmt: skip
OUTER_OPTIMIZER = optax.adam(1e-3)


def compiled(lowered) -> tuple:
    """A program, the bytes that it needs and the seconds that compiling took."""
    start = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - start
    return program, timing.bytes_needed(program), seconds


def episode(steps: int) -> tuple:
    """A call that trains a model for so many steps; its bytes and the seconds to compile it."""
    digits = advmeta.data.load("digits")
    task = advmeta.Task(
        digits.train, digits.test, advmeta.ThreatModel(), advmeta.optimizees.mlp((20,))
    )
    phi = init_meta_params(MetaOptimizerConfig(), jax.random.key(0))

    def train(phi, task, key):
        return advmeta.train(task, scale_by_meta_optimizer(phi), key, steps=steps)

    arguments = (phi, task, jax.random.key(1))
    program, needed, seconds = compiled(jax.jit(train).lower(*arguments))
    return lambda: jax.block_until_ready(program(*arguments)), needed, seconds


def meta_training(steps: int, **changes) -> tuple:
    """The same for so many outer steps."""
    config = dataclasses.replace(CONFIG, **changes)
    families = tuple(task.build() for task in config.tasks)
    state = outer_step.init_outer(config, families, OUTER_OPTIMIZER, jax.random.key(0))
    lowered = outer_step.outer_steps.lower(config, OUTER_OPTIMIZER, steps, families, state)
    program, needed, seconds = compiled(lowered)
    kept = [state]

    def run():
        kept[0], info = program(families, kept[0])
        jax.block_until_ready((kept[0], info))

    return run, needed, seconds


def variants() -> dict[str, tuple]:
    """One outer step with LSTMs of two sizes, their memory in two types, and no recomputation."""
    found = {}
    for hidden in ((8,), (20, 20)):
        for dtype in ("float32", "bfloat16"):
            config = MetaOptimizerConfig(hidden=hidden, memory_dtype=dtype)
            found[f"{hidden}, {dtype}"] = meta_training(1, meta_optimizer=config)
        config = MetaOptimizerConfig(hidden=hidden)
        stored = meta_training(1, meta_optimizer=config, recompute="nothing")
        found[f"{hidden}, nothing recomputed"] = stored
    return found


def measure(programs: dict[Any, tuple], rounds: int) -> list[dict]:
    """Of each program: its size, seconds of each call, bytes, and seconds to compile."""
    seconds = timing.take_turns({str(n): run for n, (run, _, _) in programs.items()}, rounds)
    return [
        {"size": n, "seconds": seconds[str(n)], "bytes": needed, "compile_seconds": compiling}
        for n, (_, needed, compiling) in programs.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each program")
    parser.add_argument("--small", action="store_true", help="only the first two of each size")
    arguments = parser.parse_args()
    sizes = slice(2) if arguments.small else slice(None)
    questions = {
        "episode, inner steps": {n: episode(n) for n in EPISODES[sizes]},
        "meta-training, inner steps": {
            n: meta_training(n // CONFIG.truncation) for n in EPISODES[sizes]
        },
        "truncation, inner steps": {
            n: meta_training(1, truncation=n, horizon=(10 * n, 10 * n)) for n in TRUNCATIONS[sizes]
        },
        "meta-training, tasks": {n: meta_training(1, lanes=n) for n in LANES[sizes]},
        "meta-training by evolution strategies, tasks": {
            n: meta_training(1, lanes=n, estimator="pes") for n in LANES[sizes]
        },
        "meta-training, LSTM": variants(),
    }
    table = Table("what grows", "to", "ms", "times", "MB", "times", "s to compile")
    results = {}
    for name, programs in questions.items():
        results[name] = rows = measure(programs, arguments.rounds)
        first = rows[0]
        for row in rows:
            times = [statistics.median(r["seconds"]) for r in (row, first)]
            table.add_row(
                name, str(row["size"]), f"{1e3 * times[0]:.1f}", f"{times[0] / times[1]:.2f}",
                f"{row['bytes'] / 1e6:.2f}", f"{row['bytes'] / first['bytes']:.2f}",
                f"{row['compile_seconds']:.1f}",
            )  # fmt: skip
    Console().print(table)
    timing.write("scaling", {"results": results})


if __name__ == "__main__":
    main()
