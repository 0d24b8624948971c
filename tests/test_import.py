import subprocess
import sys

import pytest

HEAVY = ["tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "orbax", "PIL", "tyro"]


@pytest.fixture(scope="module")
def loaded():
    """What is in sys.modules of a fresh interpreter after `import advmeta`."""
    code = "import sys, advmeta; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_the_package(loaded):
    assert {"advmeta", "advmeta.attacks", "jax", "optax"} <= loaded


@pytest.mark.parametrize("module", HEAVY)
def test_import_does_not_load(loaded, module):
    assert module not in loaded
