"""Names that every doctest, the README's included, may use without importing them."""

import os

# Read when the first array is made. Compiling is most of what the tests do on a CPU, and at this
# level it takes a quarter of the time; what it compiles runs as fast.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import jax
import jax.numpy as jnp
import optax
import pytest

import advmeta


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace):
    doctest_namespace.update(advmeta=advmeta, jax=jax, jnp=jnp, optax=optax)
