"""Optimizees by name, for the command line, configs and tables."""

import functools
import re

from advmeta.imports import import_function, is_import_name
from advmeta.optimizees.convolutional import cnn
from advmeta.optimizees.fully_connected import linear, mlp
from advmeta.optimizees.layers import ACTIVATIONS
from advmeta.optimizees.residual import resnet
from advmeta.types import Optimizee

KINDS = {"mlp": mlp, "cnn": cnn, "resnet": resnet}


@functools.cache  # one object a name: functions that take an optimizee are compiled once for it
def by_name(name: str, num_classes: int = 10) -> Optimizee:
    """The optimizee of a name: its kind, its sizes and, where it is not relu, its activation.

    Args:
      name: "linear", or for instance "mlp-20", "mlp-40-20-tanh", "cnn-16-32", "resnet-16-32"; or
        module:function, num_classes -> (init, apply).
      num_classes: number of logits.

    Raises:
      ValueError: a name of another form, or a function that gives something else.

    Example:
      >>> init, apply = advmeta.optimizees.by_name("mlp-40-20-tanh")
      >>> sorted(init(jax.random.key(0), (8, 8, 1)))
      ['layer_0', 'layer_1', 'layer_2']
    """
    if is_import_name(name):
        pair = import_function(name, "optimizee")(num_classes)
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(callable, pair))):
            raise ValueError(f"optimizee={name!r} gave {pair!r}; it must give a pair (init, apply)")
        return Optimizee(*pair)
    if name == "linear":
        return linear(num_classes)
    activations = "|".join(ACTIVATIONS)
    match = re.fullmatch(rf"({'|'.join(KINDS)})((?:-[1-9]\d*)+)(?:-({activations}))?", name)
    if not match:
        raise ValueError(
            f"optimizee {name!r} is unknown; the known ones are 'linear', and 'mlp', 'cnn' or "
            "'resnet' with sizes and, if it is not relu, an activation of "
            f"{list(ACTIVATIONS)}: 'mlp-20', 'mlp-40-20-tanh', 'cnn-16-32', 'resnet-16-32'"
        )
    kind, sizes, activation = match.groups()
    widths = tuple(int(size) for size in sizes.split("-")[1:])
    return KINDS[kind](widths, activation=activation or "relu", num_classes=num_classes)
