"""How long does a fresh process take to import advmeta, to say --help, and to do the main job?

    python -m benchmarks.start
    python -m benchmarks.start --run

Each is a process of its own, in turns. The imports of JAX and optax, without which nothing starts,
are the floor; an empty program is what Python itself takes. --run times `advmeta run` once, and
leaves its results in a folder that is removed.
"""

import argparse
import functools
import pathlib
import subprocess
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table

from benchmarks import timing

PROGRAMS = {
    "python": "pass",
    "import jax, optax": "import jax, optax",
    "import advmeta": "import advmeta",
    "advmeta --help": "import sys; from advmeta.cli import main; main(['--help'])",
}


def run(program: str, *arguments: str) -> None:
    command = [sys.executable, "-c", program, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main_job() -> float:
    """Seconds of `advmeta run`, with nothing compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        program = "from advmeta.cli import main; main()"
        run(program, "run", "--output", str(pathlib.Path(folder) / "run"))
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each program")
    parser.add_argument("--run", action="store_true", help="time `advmeta run`, too: minutes")
    arguments = parser.parse_args()
    contenders = {name: functools.partial(run, program) for name, program in PROGRAMS.items()}
    seconds = timing.take_turns(contenders, arguments.rounds)
    if arguments.run:
        seconds["advmeta run"] = [main_job()]
    table = Table("process", "s")
    for name, median in timing.medians(seconds).items():
        table.add_row(name, f"{median:.2f}")
    Console().print(table)
    timing.write("start", {"seconds": seconds})


if __name__ == "__main__":
    main()
