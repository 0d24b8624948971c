"""One step of `lstm.LSTM` as a Pallas kernel for GPUs: features and memory are read once.

XLA writes the gates of every coordinate to memory and reads them again; here a block of coordinates
goes through all layers in registers. On an H200 that gained nothing: with one layer of 8 units it
is as fast as XLA, with two of 20 it is 22 times slower (docs/measured.md, On a GPU).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from advmeta.meta_optimizer.lstm import Memory, flatten, merge_shared
from advmeta.types import Array, MetaParams, PyTree

BLOCK = 64  # coordinates of one program


class Layer(NamedTuple):
    """Weights of one layer, an array for each of its gates i, f, g and o."""

    own: list[Array]  # [units, inputs]
    recurrent: list[Array]  # [units, units]
    bias: list[Array]  # [units]


class Weights(NamedTuple):
    """Of all layers, padded to what a GPU's matrix unit takes."""

    layers: list[Layer]
    readout: Array  # [outputs, units]
    bias: Array  # [outputs]


def apply(
    params: MetaParams, own: Array, shared: tuple[Array, ...], memory: tuple[Memory, ...]
) -> tuple[Array, tuple[Memory, ...]]:
    """What ``LSTM.apply({"params": params}, own, shared, memory)`` gives, and its gradients.

    A CPU interprets the kernel, slowly; there is none for TPUs, where masked loads are not to be
    had. The compiler does not split it: it is for arrays that are not sharded.

    Args:
      params: of an `LSTM`.
      own: the features of each coordinate, [f, ...].
      shared: features of rows or tensors, [f, ...], which broadcast to the coordinates.
      memory: of each layer.

    Returns:
      The readout, [outputs, ...], and the new memory.
    """
    coordinates = own.shape[1:]
    flat = jax.tree.map(functools.partial(flatten, coordinates), (own, shared, memory))
    own, shared, memory = flat
    dense = [params[f"own_{layer}"] for layer in range(len(memory))]
    weights = [(layer["kernel"], layer["bias"]) for layer in dense]
    kernels = [params[f"shared_{group}"]["kernel"] for group in range(len(shared))]
    own, kernel, bias = merge_shared(own, shared, *weights[0], kernels)
    weights[0] = kernel, bias.reshape(-1)
    layers = [_layer(*w, m.h.shape[0]) for w, m in zip(weights, memory, strict=True)]
    readout, bias = params["readout"]["kernel"], params["readout"]["bias"]
    padded = Weights(layers, _pad(readout.T), _pad(bias))
    found = _step(bias.shape[0], padded, own, memory)
    return jax.tree.map(lambda a: a.reshape(a.shape[0], *coordinates), found)


def _layer(kernel: Array, bias: Array, units: int) -> Layer:
    """From a dense layer of ``[x; h]`` whose gates lie side by side."""
    parts = kernel[:-units].T, kernel[-units:].T, bias
    return Layer(*([_pad(gate) for gate in jnp.split(part, 4)] for part in parts))


def _size(n: int) -> int:
    """Of a padded axis: Triton's arrays are powers of two, and its products 16 at least."""
    return max(16, 1 << (n - 1).bit_length())


def _pad(x: Array) -> Array:
    return jnp.pad(x, [(0, _size(n) - n) for n in x.shape])


def _equations(weights: Weights, own: Array, memory: tuple[Memory, ...]):
    """Those of `LSTM` for a block, whose padding is zero and stays so but for the readout's."""
    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)  # not TF32
    x, updated = own, []
    for layer, (h, c) in zip(weights.layers, memory, strict=True):
        i, f, g, o = (
            dot(own, x) + dot(recurrent, h) + bias[:, None]
            for own, recurrent, bias in zip(*layer, strict=True)
        )
        c = jax.nn.sigmoid(f + 1.0) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        x = h
        updated.append(Memory(h, c))
    return dot(weights.readout, x) + weights.bias[:, None], tuple(updated)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(outputs: int, weights: Weights, own: Array, memory: tuple[Memory, ...]):
    columns = (jax.ShapeDtypeStruct((outputs, own.shape[1]), own.dtype), memory)
    return _over_blocks(_equations, weights, (own, memory), columns, None)


def _forward(outputs: int, weights: Weights, own: Array, memory: tuple[Memory, ...]):
    return _step(outputs, weights, own, memory), (weights, own, memory)


def _backward(outputs: int, kept: tuple, cotangents: tuple):
    del outputs
    weights, own, memory = kept

    def pull_back(weights, own, memory, cotangents):
        # What the forward pass did in the block is done again, and nothing of it is stored.
        of_weights, *of_columns = jax.vjp(_equations, weights, own, memory)[1](cotangents)
        return tuple(of_columns), of_weights

    of_columns, of_weights = _over_blocks(
        pull_back, weights, (own, memory, cotangents), (own, memory), weights
    )
    return jax.tree.map(lambda parts: parts.sum(axis=0), of_weights), *of_columns


_step.defvjp(_forward, _backward)


def _over_blocks(function, weights: Weights, inputs: PyTree, columns: PyTree, parts: PyTree) -> Any:
    """``function(weights, *inputs)`` of each block of coordinates.

    It gives arrays of the shapes of ``columns``, [width, n], and, unless ``parts`` is None, also
    arrays of the shapes of ``parts`` for each block, which come back stacked.
    """
    given, treedef = jax.tree.flatten((weights, *inputs))
    n, weights_count = given[-1].shape[1], len(jax.tree.leaves(weights))
    wanted, several = jax.tree.flatten(columns if parts is None else (columns, parts))
    columns_count, blocks = len(jax.tree.leaves(columns)), pl.cdiv(n, BLOCK)

    def kernel(*refs):
        inputs, outputs = refs[: len(given)], refs[len(given) :]
        left = n - pl.program_id(0) * BLOCK
        values = [ref[...] for ref in inputs[:weights_count]]
        for ref, array in zip(inputs[weights_count:], given[weights_count:], strict=True):
            values.append(triton.load(ref, mask=_inside(array, left), other=0.0))
        found = jax.tree.leaves(function(*treedef.unflatten(values)))
        for ref, value, array in zip(outputs[:columns_count], found, wanted, strict=False):
            triton.store(ref, value, mask=_inside(array, left))
        for ref, value in zip(outputs[columns_count:], found[columns_count:], strict=True):
            ref[...] = value

    def call(*arrays, interpret: bool):
        leading = [()] * columns_count + [(blocks,)] * (len(wanted) - columns_count)
        return pl.pallas_call(
            kernel,
            grid=(blocks,),
            in_specs=[
                *map(_whole, given[:weights_count]),
                *map(_columns_of, given[weights_count:]),
            ],
            out_specs=[
                *map(_columns_of, wanted[:columns_count]),
                *map(_part, wanted[columns_count:]),
            ],
            out_shape=[
                jax.ShapeDtypeStruct((*axes, *a.shape), a.dtype)
                for axes, a in zip(leading, wanted, strict=True)
            ],
            compiler_params=triton.CompilerParams(num_warps=4),
            interpret=interpret,
        )(*arrays)

    found = jax.lax.platform_dependent(
        *given,
        cpu=functools.partial(call, interpret=True),
        cuda=functools.partial(call, interpret=False),
    )
    return several.unflatten(found)


def _inside(array: Any, left: Any) -> Array:
    """Which entries of a padded block are the array's, if so many coordinates are left."""
    shape = _size(array.shape[0]), BLOCK
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return (row < array.shape[0]) & (column < left)


def _columns_of(array: Any) -> pl.BlockSpec:
    return pl.BlockSpec((_size(array.shape[0]), BLOCK), lambda i: (0, i))


def _whole(array: Any) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim)


def _part(array: Any) -> pl.BlockSpec:
    return pl.BlockSpec((None, *array.shape), lambda i: (i, *[0] * array.ndim))
