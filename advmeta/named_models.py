"""Models that a command line names: a user's function, or parameters in a file."""

import importlib
import os
import sys
from collections.abc import Callable

import jax
from jax.tree_util import keystr, tree_leaves_with_path

from advmeta import optimizees
from advmeta.parameter_files import load_any_params
from advmeta.types import Array, Params, PyTree


def import_model(name: str) -> Callable:
    """Imports the function that "module:function" names; the current folder is looked in first.

    Raises:
      ValueError: a name of another form, no such module, or no such function in it.
    """
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise ValueError(
            f"model={name!r} must be module:function, as in my_models:logits for logits(x) in "
            "my_models.py"
        )
    # As `python -m` does; a console script looks beside itself instead.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks something itself
        raise ValueError(
            f"there is no module {error.name!r} in {os.getcwd()} or among the installed ones; "
            f"model={name!r} must be module:function, without .py"
        ) from error
    if not hasattr(module, function_name):
        raise ValueError(f"model={name!r}: there is no {function_name!r} in {module_name}")
    function = getattr(module, function_name)
    if not callable(function):
        raise ValueError(
            f"model={name!r}: {function_name} is of type {type(function).__name__}; name a "
            "function that returns logits [n, classes]"
        )
    return function


def saved_model(
    path: str | os.PathLike, optimizee: str, x_shape: tuple[int, ...], num_classes: int
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
