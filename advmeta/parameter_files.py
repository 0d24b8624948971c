"""Nested dicts of arrays in safetensors files. Nothing is unpickled."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from advmeta.types import PyTree


def save_params(path: str | os.PathLike[str], params: PyTree) -> None:
    """Writes a model's parameters to a safetensors file, in one go.

    Args:
      path: ends in ".safetensors"; its folder is made if it is not there.
      params: nested dicts of arrays, as `advmeta.train` and Flax give.

    Raises:
      ValueError: another ending, or anything but nested dicts of arrays with text as keys.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "model.safetensors"
      ...     advmeta.save_params(path, {"layer": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}})
      ...     advmeta.load_params(path)["layer"]["bias"].tolist()
      [0.0, 0.0]
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path={str(path)!r} must end in '.safetensors'")
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _flat(params).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(save(arrays))
    os.replace(temporary, path)


def load_params(path: str | os.PathLike[str]) -> PyTree:
    """Reads what `save_params` wrote.

    Args:
      path: of the safetensors file.

    Returns:
      Nested dicts of arrays.

    Raises:
      ValueError: there is no such file, or it is not safetensors.

    Example:
      See `save_params`.
    """
    try:
        arrays = load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {str(path)!r}") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is not a safetensors file ({error}); nothing else is read, pickles and "
            "msgpack neither: save weights with advmeta.save_weights or advmeta.save_params"
        ) from error
    return unflatten_dict({name: jnp.asarray(leaf) for name, leaf in arrays.items()}, sep="/")


def load_any_params(path: str | os.PathLike[str]) -> PyTree:
    """Reads parameters that others wrote: safetensors, Flax's msgpack, or an Orbax checkpoint.

    Args:
      path: a file that ends in ".safetensors" or ".msgpack", or the folder of a checkpoint.

    Returns:
      Nested dicts of arrays.

    Raises:
      ValueError: there is nothing there, it cannot be read, or it holds no nested dict of arrays.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        params = _read_orbax(path)
    elif path.suffix == ".msgpack":
        params = _read_msgpack(path)
    else:
        return load_params(path)
    return jax.tree.map(jnp.asarray, unflatten_dict(_flat(params), sep="/"))


def _read_msgpack(path: pathlib.Path) -> PyTree:
    from flax.serialization import msgpack_restore

    try:
        return msgpack_restore(path.read_bytes())
    except OSError as error:
        raise ValueError(f"there is no file {str(path)!r}") from error
    except Exception as error:  # whatever msgpack and NumPy raise on bytes that are not theirs
        raise ValueError(f"{str(path)!r} is not Flax's msgpack ({error})") from error


def _read_orbax(path: pathlib.Path) -> PyTree:
    import orbax.checkpoint as ocp  # only here: it takes most of a second to import

    try:
        return ocp.StandardCheckpointer().restore(path.absolute())
    except Exception as error:  # whatever Orbax raises on a folder that is not its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{str(path)!r} is not an Orbax checkpoint ({reason})") from error


def _flat(params: PyTree) -> dict[str, Any]:
    """Paths joined by "/" -> arrays."""
    advice = "write nested dicts of arrays, as in {'layer': {'kernel': w, 'bias': b}}"
    if not isinstance(params, dict) or not jax.tree.leaves(params):
        raise ValueError(f"params={params!r} must hold something in a dict; {advice}")
    for keys, leaf in flatten_dict(params, keep_empty_nodes=True).items():
        if not all(isinstance(key, str) and key and "/" not in key for key in keys):
            raise ValueError(f"the keys {keys} must be text without '/'; {advice}")
        if leaf is empty_node:
            raise ValueError(f"{'/'.join(keys)} is empty, which no file can hold: leave it out")
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            raise ValueError(f"{'/'.join(keys)} is of type {type(leaf).__name__}; {advice}")
    return flatten_dict(params, sep="/")
