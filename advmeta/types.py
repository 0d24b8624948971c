"""The vocabulary of the package; no logic.

Shapes in docstrings are written in brackets: n examples, h x w pixels, c channels, k classes.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax

Array = jax.Array
Key = chex.PRNGKey  # a typed `jax.random.key`, used once
PyTree = Any
Params = PyTree  # of the optimizee
MetaParams = PyTree  # of the meta-optimizer
Norm = Literal["linf", "l2", "l1"]
LogitsFn = Callable[[Array], Array]  # x [n, ...] -> logits [n, k]


class Batch(NamedTuple):
    """Examples and their labels."""

    x: Array  # [n, h, w, c] float32, within the bounds of the threat model
    y: Array  # [n] int32


class Optimizee(NamedTuple):
    """The model being trained, as two pure functions."""

    init: Callable[[Key, tuple[int, ...]], Params]  # (key, x_shape) -> params
    apply: Callable[[Params, Array], Array]  # (params, x [n, ...]) -> logits [n, k]
