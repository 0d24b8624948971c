"""Models that a command line names: optimizees with parameters in a file."""

import os
from collections.abc import Callable

import jax
from jax.tree_util import keystr, tree_leaves_with_path

from advmeta import optimizees
from advmeta.parameter_files import load_any_params
from advmeta.types import Array, Params, PyTree


def saved_model(
    path: str | os.PathLike[str], optimizee: str, x_shape: tuple[int, ...], num_classes: int
) -> tuple[Callable[[Params, Array], Array], Params]:
    """An optimizee's apply, and its parameters from a file that `load_any_params` reads.

    Args:
      path: of the file.
      optimizee: what the parameters are of, for instance "mlp-20".
      x_shape: of one example.
      num_classes: of the data.

    Raises:
      ValueError: an unknown optimizee, no such file, or parameters of other shapes.
    """
    init, apply = optimizees.by_name(optimizee, num_classes)
    params = load_any_params(path)
    needed = _shapes(jax.eval_shape(lambda key: init(key, x_shape), jax.random.key(0)))
    given = _shapes(params)
    for name in sorted(needed.keys() | given.keys()):
        if needed.get(name) != given.get(name):
            raise ValueError(
                f"{str(path)!r}: params{name} has shape {given.get(name)}, but {optimizee} for "
                f"images of shape {x_shape} and {num_classes} classes has {needed.get(name)} "
                "(None: not there at all); name the optimizee and the data it was trained on"
            )
    return apply, params


def _shapes(params: PyTree) -> dict[str, tuple[int, ...]]:
    return {keystr(path): leaf.shape for path, leaf in tree_leaves_with_path(params)}
