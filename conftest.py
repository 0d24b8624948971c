"""Names that every doctest, the README's included, may use without importing them."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

# What one of the processes has compiled, the others need not: of pytest-xdist, and those that tests
# start. It begins empty.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="advmeta-tests-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
else:
    CACHE = None

import jax
import jax.numpy as jnp
import optax
import pytest

import advmeta


def is_known(flags: str) -> bool:
    """Whether this XLA knows these options: it ends a process at one that it does not know."""
    probe = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"XLA_FLAGS": flags}
    return subprocess.run(probe, env=environment, capture_output=True).returncode == 0


# Read when the first array is made. Compiling is most of what the tests do on a CPU. At this level
# it takes a quarter of the time, what it compiles runs as fast; and a third less without the
# emitters by way of MLIR, which a later XLA may no longer let one choose.
if "XLA_FLAGS" not in os.environ:
    level = "--xla_backend_optimization_level=1"
    without_emitters = f"{level} --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = without_emitters if is_known(without_emitters) else level


def pytest_unconfigure():
    if CACHE is not None:
        shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace):
    doctest_namespace.update(advmeta=advmeta, jax=jax, jnp=jnp, optax=optax)


@pytest.fixture(autouse=True)
def pages_compile_fast(request):
    """The examples on pages train a few small models: compiling takes longer than running."""
    before = jax.config.read("jax_disable_most_optimizations")
    fast = request.node.path.suffix == ".md"
    jax.config.update("jax_disable_most_optimizations", before or fast)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """A compiled program takes hundreds of memory maps, and Linux allows a process 65,530."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
