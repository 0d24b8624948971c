"""Does a meta-training that is killed again and again end with the weights of one that is not?

    python -m benchmarks.soak

Two runs of the same small meta-training: one in peace, one that gets SIGKILL at random moments, of
its start-up and compilation too, and is taken up with --resume. Compared bit for bit: the weights,
and what metrics.jsonl says but for the seconds. Exits with 1 where they differ.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

CONFIG = {
    "tasks": [{"optimizee": "linear"}, {"optimizee": "mlp-10"}],
    "selection": [{"optimizee": "mlp-12"}],
    "meta_optimizer": {"hidden": [4]},
    "lanes": 2,
    "truncation": 2,
    "horizon": [4, 8],
    "evaluate_every": 10,
}


def command(folder: pathlib.Path, config: pathlib.Path) -> list[str]:
    program = "from advmeta.cli import main; main()"
    options = ["--config", config, "--output", folder, "--checkpoint-seconds", "0", "--resume"]
    return [sys.executable, "-c", program, "meta-train", *map(str, options)]


def killed(argv: list[str], env: dict, rng: random.Random, longest: float) -> bool:
    """Whether the process was killed before it ended by itself."""
    process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL)
    try:
        code = process.wait(timeout=rng.uniform(0, longest))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    if code != 0:
        raise RuntimeError(f"the run ended with {code} by itself")
    return False


def outcome(folder: pathlib.Path) -> tuple[bytes, list[dict]]:
    """The weights, and the records without the times."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    plain = [{k: v for k, v in record.items() if k != "seconds"} for record in records]
    return (folder / "meta_optimizer.safetensors").read_bytes(), plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--outer-steps", type=int, default=4000)
    parser.add_argument("--longest", type=float, default=15.0, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        config = scratch / "config.json"
        training = {**CONFIG, "outer_steps": arguments.outer_steps}
        config.write_text(json.dumps({"training": training}))
        # Both runs find the first one's programs, or the kills would only meet the compiler.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(scratch / "cache")}
        env = {**os.environ, **cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        start = time.perf_counter()
        subprocess.run(command(scratch / "peace", config), env=env, check=True)
        print(f"in peace: {time.perf_counter() - start:.0f} s", flush=True)
        argv, kills = command(scratch / "killed", config), 0
        while kills < arguments.kills and killed(argv, env, rng, arguments.longest):
            kills += 1
            path = scratch / "killed" / "metrics.jsonl"
            lines = path.read_text().count("\n") if path.exists() else 0
            print(f"kill {kills}: {lines} records so far", flush=True)
        subprocess.run(argv, env=env, check=True)
        weights, records = outcome(scratch / "peace")
        same_weights, same_records = outcome(scratch / "killed")
    ok = weights == same_weights and records == same_records
    verdict = {True: "the same", False: "NOT the same"}
    print(f"{kills} kills; weights: {verdict[weights == same_weights]}")
    print(f"{len(records)} records: {verdict[records == same_records]}")
    if kills < arguments.kills:
        print("the run ended before all kills: give more --outer-steps")
    sys.exit(not ok or kills < arguments.kills)


if __name__ == "__main__":
    main()
