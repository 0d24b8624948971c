"""Names that every doctest, the README's included, may use without importing them."""

import os
import pathlib
import shutil
import tempfile

# Read when the first array is made. Compiling is most of what the tests do on a CPU, and at this
# level it takes a quarter of the time; what it compiles runs as fast.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
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
