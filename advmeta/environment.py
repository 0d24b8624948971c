"""What a result was made with: hardware and versions, for cards and reports."""

import importlib.metadata
import os
import platform

import jax

PACKAGES = ("advmeta", "jax", "jaxlib", "flax", "optax", "numpy")


def describe() -> dict:
    """Hardware and versions, as JSON can hold them."""
    device = jax.devices()[0]
    return {
        "hardware": f"{jax.device_count()} x {device.device_kind}, {os.cpu_count()} CPU cores, "
        f"{platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }
