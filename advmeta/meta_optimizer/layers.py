"""Where each tensor of a model stands: which layers there are, and in which order."""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, GetAttrKey

from advmeta.types import Params

# Of more layers than that no other order than that of their names is sought.
MOST_LAYERS = 12
_SCALES = (DictKey("scale"), GetAttrKey("scale"))
_BIASES = (DictKey("bias"), GetAttrKey("bias"), DictKey("offset"), GetAttrKey("offset"))


class LayerPosition(NamedTuple):
    """Where a tensor stands in the model and how large it is; known from the tree alone."""

    first: bool
    last: bool
    bias: bool  # or a scale: by name, or of rank 1 or 0
    outputs: int  # the axis of the layer's outputs; the others are inputs and places
    fan_in: int
    fan_out: int
    depth: int = 0  # of its layer, among those that have a kernel
    layers: int = 1  # that have a kernel, in the whole model
    convolutional: bool = False  # the model has a kernel of rank 3 or more
    normalised: bool = False  # the model has scales, which follow a normalisation


class _Leaf(NamedTuple):
    path: tuple
    shape: tuple[int, ...]
    bias: bool  # or a scale
    scale: bool
    outputs: int  # axis


def layer_positions(params: Params) -> list[LayerPosition]:
    """The position of every leaf, in the order of `jax.tree.leaves`.

    A layer is a set of leaves with the same parent that has a kernel, a leaf of rank 2 or more;
    where a parent has several, each is a layer of its own, with the bias of the same number. A
    kernel's axes are (..., inputs, outputs), but (outputs, inputs, ...) where it is the attribute
    ``weight`` of a module, as in Equinox. A scale is the key or attribute ``scale`` (Flax, Haiku),
    of whatever rank, or an attribute ``weight`` of rank 1 or of the shape of the bias beside it.

    Layers follow each other as their names do, with numbers compared as numbers, and a module's
    attributes as they come, unless that is by the alphabet, as in Flax NNX: then as names do. Where
    each then does not take what the one before it gives, but in another order each does, they
    follow in that one: "stem", "body", "head", for one.
    """
    found = jax.tree_util.tree_leaves_with_path(params)
    shapes = {unboxed(path): jnp.shape(leaf) for path, leaf in found}
    leaves = [_leaf(path, shapes) for path in shapes]
    order = _natural_order([leaf.path for leaf in leaves])
    layers = _layers(leaves, order)
    kernels = {layers[i]: leaf for i, leaf in enumerate(leaves) if not leaf.bias}
    chain = _chain([kernels[layer] for layer in sorted(kernels)])
    depths = {layer: depth for layer, depth in zip(sorted(kernels), chain, strict=True)}
    convolutional = any(len(leaf.shape) > 2 for leaf in kernels.values())
    normalised = any(leaf.scale for leaf in leaves)
    positions = []
    for leaf, layer in zip(leaves, layers, strict=True):
        fan_out = math.prod(leaf.shape) if leaf.bias else leaf.shape[leaf.outputs]
        positions.append(
            LayerPosition(
                first=depths.get(layer) == 0,
                last=depths.get(layer) == len(depths) - 1,
                bias=leaf.bias,
                outputs=leaf.outputs,
                fan_in=max(1, math.prod(leaf.shape) // max(1, fan_out)),
                fan_out=max(1, fan_out),
                depth=depths.get(layer, 0),
                layers=max(1, len(depths)),
                convolutional=convolutional,
                normalised=normalised,
            )
        )
    return positions


def _leaf(path: tuple, shapes: dict[tuple, tuple[int, ...]]) -> _Leaf:
    """Of a path; ``shapes`` are those of all."""
    shape, name = shapes[path], path[-1] if path else ""  # "": the tree is one array
    is_weight = name == GetAttrKey("weight")
    beside = shapes.get((*path[:-1], GetAttrKey("bias")))
    scale = name in _SCALES or (is_weight and (len(shape) == 1 or shape == beside))
    bias = len(shape) < 2 or scale or name in _BIASES
    return _Leaf(path, shape, bias, scale, 0 if bias or is_weight else len(shape) - 1)


def unboxed(path: tuple) -> tuple:
    """The path without the ``.value`` of the variable that Flax NNX keeps an array in."""
    return path[:-1] if path[-1:] == (GetAttrKey("value"),) else path


def _natural_order(paths: list[tuple]) -> list[tuple]:
    """What sorts layer_10 after layer_2, and attributes as they come; a key for each path."""
    children: dict[tuple, dict[Any, str]] = {}
    for path in paths:
        for depth, name in enumerate(path):
            text = jax.tree_util.keystr((name,), simple=True)
            children.setdefault(path[:depth], {})[name] = text

    def key(parent: tuple, name: Any) -> tuple:
        texts = list(children[parent].values())
        if isinstance(name, GetAttrKey) and texts != sorted(texts):
            return ((texts.index(children[parent][name]), ""),)
        words = re.split(r"(\d+)", children[parent][name])
        return tuple((int(w), "") if w.isdigit() else (-1, w) for w in words)

    return [tuple(key(path[:i], name) for i, name in enumerate(path)) for path in paths]


def _layers(leaves: list[_Leaf], order: list[tuple]) -> list[tuple]:
    """The layer of each leaf, as something to sort by."""
    layers = _natural_order([leaf.path[:-1] for leaf in leaves])
    beside: dict[tuple, list[int]] = {}
    for i in sorted(range(len(leaves)), key=order.__getitem__):
        beside.setdefault(layers[i], []).append(i)
    for members in beside.values():
        kernels = [i for i in members if not leaves[i].bias]
        biases = [i for i in members if leaves[i].bias]
        if len(kernels) > 1:
            for i in kernels:
                layers[i] = order[i]
            if len(biases) == len(kernels):
                for bias, kernel in zip(biases, kernels, strict=True):
                    layers[bias] = order[kernel]
    return layers


def _chain(kernels: list[_Leaf]) -> list[int]:
    """The depth of each layer: as they are, unless only in another order each can follow."""
    by_name = list(range(len(kernels)))
    if len(kernels) > MOST_LAYERS or all(map(_follows, kernels, kernels[1:])):
        return by_name

    @functools.cache
    def rest(last: int, left: frozenset[int]) -> tuple[int, ...] | None:
        """An order of what is left after a layer, if there is one."""
        if not left:
            return ()
        for i in sorted(left):
            fits = _follows(kernels[last], kernels[i])
            if fits and (found := rest(i, left - {i})) is not None:
                return i, *found
        return None

    for first in by_name:
        if (found := rest(first, frozenset(by_name) - {first})) is not None:
            order = [first, *found]
            return [order.index(i) for i in by_name]
    return by_name


def _follows(a: _Leaf, b: _Leaf) -> bool:
    """Whether a layer with the kernel b can take what one with the kernel a gives."""
    given, inputs = a.shape[a.outputs], _inputs(b)
    if len(a.shape) > 2 and len(b.shape) == 2:  # all places of an image
        return given > 0 and inputs % given == 0
    return (len(a.shape) == len(b.shape)) and given == inputs


def _inputs(kernel: _Leaf) -> int:
    return kernel.shape[1] if kernel.outputs == 0 else kernel.shape[-2]
