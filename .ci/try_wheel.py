"""Tries a wheel that is installed in the environment of this interpreter, from an empty folder.

cd "$(mktemp -d)" && VENV/bin/python .../.ci/try_wheel.py advmeta-*.whl
"""

import json
import os
import pathlib
import subprocess
import sys
import zipfile

# Read when the first array is made: to compile in a quarter of the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import jax
import optax

import advmeta

PRETRAINED = ["mixture", "mixture-adversarial", "mixture-noisy"]
# What is no Python file, and is missed only when it is used.
NEEDED = {
    "advmeta/py.typed",
    "advmeta/data/fashion_small.npz",
    "advmeta/data/fashion_small.LICENSE",
    *(
        f"advmeta/meta_optimizer/pretrained/{name}.{kind}"
        for name in PRETRAINED
        for kind in ("json", "safetensors")
    ),
    "advmeta/report/page.css",
}


def main() -> None:
    names = set(zipfile.ZipFile(sys.argv[1]).namelist())
    assert names >= NEEDED, f"the wheel lacks {NEEDED - names}"
    foreign = {name for name in names if name.split("/")[0].partition("-")[0] != "advmeta"}
    assert not foreign and not any("test" in name for name in names), names
    assert pathlib.Path(advmeta.__file__).is_relative_to(sys.prefix), advmeta.__file__

    assert len(advmeta.data.load("fashion_small").test.y) == 1000
    assert say("--version").startswith("advmeta ")
    assert "meta-train" in say("--help")
    assert advmeta.list_pretrained() == PRETRAINED
    data = advmeta.data.load("digits")
    optimizee = advmeta.optimizees.linear()
    task = advmeta.Task(data.train, data.test, advmeta.ThreatModel("linf", 0.1), optimizee)
    optimizer = optax.chain(optax.clip(1.0), advmeta.load_meta_optimizer("mixture"))
    params, trajectory = advmeta.train(task, optimizer, jax.random.key(0), steps=50)
    assert trajectory.loss[-1] < trajectory.loss[0]
    advmeta.save_params("linear.safetensors", params)
    options = "--params linear.safetensors --optimizee linear --steps 20 --examples 100"
    say("patch", *options.split(), "--output", "patched")
    results = json.loads(pathlib.Path("patched/results.json").read_text())
    assert results["steps"] == 20 and pathlib.Path("patched/patched.safetensors").exists()
    print(f"{sys.argv[1]}: {len(names)} files, as they should be")


def say(*arguments: str) -> str:
    """What `advmeta` prints."""
    command = [pathlib.Path(sys.prefix, "bin", "advmeta"), *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


main()
