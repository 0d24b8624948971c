"""Parameters on disk: a round trip, and what is refused."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import advmeta


def test_round_trip_is_exact_whatever_the_dtype_and_the_layout(tmp_path):
    params = {
        "layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T, "bias": jnp.zeros(0)},
        "scale": jnp.float32(0.1),
        "half": jnp.array([1.5, -2.0], jnp.bfloat16),
        "steps": jnp.int32(3),
    }
    path = tmp_path / "deep" / "model.safetensors"
    advmeta.save_params(path, params)
    loaded = advmeta.load_params(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_array_equal(one, other)
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (jnp.zeros(2), "must hold something in a dict"),
        ({}, "must hold something in a dict"),
        ({"layer": [jnp.zeros(2)]}, "layer is of type list"),
        ({"layer": {"kernel": 0.5}}, "layer/kernel is of type float"),
        ({"w": jnp.zeros(2), "empty": {}}, "empty is empty, which no file can hold"),
        ({"a/b": jnp.zeros(2)}, "must be text without '/'"),
        ({0: jnp.zeros(2)}, "must be text without '/'"),
    ],
)
def test_what_would_not_come_back_as_it_was_is_refused(tmp_path, params, message):
    with pytest.raises(ValueError, match=message):
        advmeta.save_params(tmp_path / "model.safetensors", params)
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="there is no file"):
        advmeta.load_params(path)
    path.write_bytes(pickle.dumps({"w": np.zeros(2)}))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        advmeta.load_params(path)
    with pytest.raises(ValueError, match="must end in"):
        advmeta.save_params(tmp_path / "model.npz", {"w": jnp.zeros(2)})
