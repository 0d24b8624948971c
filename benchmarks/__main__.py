"""All measurements against peers, and the README's table of them.

    pip install -e '.[benchmarks]'
    python -m benchmarks --quick
    python -m benchmarks --table

Each script runs in a process of its own and appends a line to benchmarks/results; the table is of
the last line of each. --table renders it without running anything.
"""

import argparse
import json
import statistics
import subprocess
import sys

from rich.console import Console

from benchmarks import timing

SCRIPTS = {  # of each: the options that make it quick
    "attacks": ["--rounds", "1", "--autoattack-rounds", "1", "--examples", "64"],
    "meta_step": ["--rounds", "3"],
    "update": ["--rounds", "3", "--sizes", "1000", "16000", "1000000"],
    "scaling": ["--rounds", "2", "--small"],
    "start": ["--rounds", "2"],
}


def last(question: str) -> dict | None:
    """What a script found the last time that it ran here; None before that."""
    path = timing.RESULTS / f"{question}.jsonl"
    return json.loads(path.read_text().splitlines()[-1]) if path.exists() else None


def attack_rows(result: dict):
    for line in result["results"]:
        if line["attack"] != "oracle":
            medians = timing.medians(line["seconds"])
            ours = medians.pop("advmeta")
            what = f"{line['attack']}, {line['setting']}, {result['examples']} images"
            ratios = [f"{name} {seconds / ours:.2f}" for name, seconds in medians.items()]
            yield what, f"{ours:.3g} s", "faster than " + ", ".join(ratios)


def meta_step_rows(result: dict):
    medians = timing.medians(result["seconds"])
    ours = medians.pop("advmeta, the same work")
    ratios = [f"{name} {seconds / ours:.2f}" for name, seconds in medians.items()]
    yield (
        "an inner step of meta-training",
        f"{1e3 * ours:.3g} ms",
        "times as long: " + ", ".join(ratios),
    )


def update_rows(result: dict):
    sizes = sorted({row["parameters"] for row in result["rows"]})
    for size in sizes:
        rows = {r["optimizer"]: r for r in result["rows"] if r["parameters"] == size}
        for name, row in rows.items():
            what = f"an update of {size:,} parameters, {name}"
            limits = f"{row['of_product_rate']:.2f} of the product rate"
            yield (
                what,
                f"{row['ns']:.3g} ns a parameter",
                f"{limits}; {row['state_bytes']:.0f} bytes",
            )


def scaling_rows(result: dict):
    for question, rows in result["results"].items():
        first = rows[0]
        for row in rows[1:]:
            times = [statistics.median(r["seconds"]) for r in (row, first)]
            what = f"{question}, {row['size']} for {first['size']}"
            memory = f"{row['bytes'] / first['bytes']:.2f} times the memory"
            yield what, f"{times[0] / times[1]:.2f} times the time", memory


def start_rows(result: dict):
    for name, seconds in timing.medians(result["seconds"]).items():
        yield name, f"{seconds:.2f} s", ""


ROWS = {
    "attacks": attack_rows,
    "meta_step": meta_step_rows,
    "update": update_rows,
    "scaling": scaling_rows,
    "start": start_rows,
}


def table() -> str:
    """The last results of each script, in Markdown."""
    lines = ["| what | advmeta | against | commit |", "| --- | --- | --- | --- |"]
    for question, rows in ROWS.items():
        result = last(question)
        if result:
            commit = result["commit"][:7]
            lines += [f"| {' | '.join(row)} | {commit} |" for row in rows(result)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--table", action="store_true", help="only the table of the last results")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    arguments = parser.parse_args()
    for name in [] if arguments.table else arguments.only:
        options = SCRIPTS[name] if arguments.quick else []
        Console().rule(name)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=True)
    print(table())


if __name__ == "__main__":
    main()
