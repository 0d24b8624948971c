"""What a user's own code adds to the names that advmeta knows: module:attribute."""

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any


def is_import_name(name: str) -> bool:
    """Whether a name has the form module:attribute."""
    return re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name) is not None


def import_attribute(name: str, what: str) -> object:
    """Imports what "module:attribute" names; the current folder is looked in first.

    Args:
      name: for instance "my_models:logits" for ``logits`` in my_models.py.
      what: the option that holds the name, for messages.

    Raises:
      ValueError: a name of another form, no such module, or nothing of that name in it.
    """
    if not is_import_name(name):
        raise ValueError(
            f"{what}={name!r} must be module:attribute, as in my_code:{what} for what is called "
            f"{what} in my_code.py"
        )
    module_name, _, attribute = name.partition(":")
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
            f"{what}={name!r} must be module:attribute, without .py"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"{what}={name!r}: there is no {attribute!r} in {module_name}")
    return getattr(module, attribute)


def import_function(name: str, what: str) -> Callable[..., Any]:
    """The same, for a function.

    Raises:
      ValueError: what is there cannot be called; else as `import_attribute`.
    """
    function = import_attribute(name, what)
    if not callable(function):
        raise ValueError(f"{what}={name!r} is of type {type(function).__name__}; name a function")
    return function
