"""Names that every doctest, the README's included, may use without importing them."""

import jax
import jax.numpy as jnp
import optax
import pytest

import advmeta


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace):
    doctest_namespace.update(advmeta=advmeta, jax=jax, jnp=jnp, optax=optax)
