"""Meta-trainings and updates on several devices; what needs them is in `on_eight_devices.py`."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from advmeta import MetaTrainingConfig, meta_train


@pytest.mark.slow
def test_on_eight_devices():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "on_eight_devices.py"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        ((1,), ("lanes",), r"has the axes \('lanes',\), and lanes are split over 'data'; write "),
        ((3,), ("data",), "lanes=4 cannot be split evenly over 3 devices .*; write lanes=6, or"),
        ((8, 2), ("data", "model"), "over 8 devices .*; write lanes=8"),
    ],
)
def test_bad_meshes_are_refused_before_anything_is_computed(shape, names, message):
    mesh = jax.sharding.AbstractMesh(shape, names)
    with pytest.raises(ValueError, match=message):
        meta_train(MetaTrainingConfig(lanes=4), key=jax.random.key(0), mesh=mesh)
