"""What the networks are given of each tensor: those of `features.FEATURES` that are chosen."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from advmeta.meta_optimizer.features import (
    Aim,
    aim_features,
    layer_features,
    log_sign,
    loss_features,
    over_coordinates,
    parameter_features,
    reach_features,
    time_features,
)
from advmeta.meta_optimizer.jacobian import gain_and_pull
from advmeta.meta_optimizer.layers import LayerPosition
from advmeta.types import Array


class Coordinates(NamedTuple):
    """What is known of the coordinates of one tensor at one step; None: the features hide it."""

    gradient: Array
    direction: Any  # of `rule.adam`: m_hat over a root of v_hat
    normalised: Any  # g over the same
    parameter: Any
    pull: Any  # towards a smaller Jacobian, of RMS 1
    position: LayerPosition


def see(chosen: tuple[str, ...], tensor: Coordinates) -> Array:
    """The chosen features that each coordinate has of its own, [f, ...]."""
    own = [tensor.gradient[None][:0]]  # none yet, sharded as the gradient
    if "log_sign" in chosen:
        own.append(log_sign(tensor.gradient))
    if "adam" in chosen:
        own.append(jnp.stack([tensor.direction, tensor.normalised]))
    if "parameter" in chosen:
        own.append(parameter_features(tensor.parameter))
    if "jacobian" in chosen:
        own.append(tensor.pull[None])
    return jnp.concatenate(own)


def share(
    chosen: tuple[str, ...],
    parameter: Array,
    gradient: Array,
    position: LayerPosition,
    of_all: tuple[Array, ...],
) -> tuple[Array, ...]:
    """The chosen features that rows and tensors share, [f, ...] each; last those of `situation`."""
    everywhere = tuple(over_coordinates(part, gradient) for part in of_all)
    if "layer" not in chosen:
        return everywhere
    return layer_features(parameter, gradient, position) + everywhere


def look_at_jacobian(
    chosen: tuple[str, ...], aim: Aim, parameters: list, positions: list
) -> tuple[Array, list[Any]]:
    """The reach [], and the pull of each tensor: zeros of a bias, None where the features hide it.

    The reach is how far an adversary of radius epsilon moves a logit, in nats. It is 1 where that
    is not known: where the model has no kernel, or normalises what they make.
    """
    unknown = jnp.ones([], jnp.float32)
    if {"jacobian", "reach"}.isdisjoint(chosen):
        return unknown, [None] * len(parameters)
    kernels = [i for i, p in enumerate(parameters) if p.size and not positions[i].bias]
    kernels.sort(key=lambda i: (positions[i].depth, i))
    gain, found = gain_and_pull(
        [parameters[i] for i in kernels], [positions[i] for i in kernels], aim.norm
    )
    known = kernels and not positions[0].normalised
    by_leaf = dict(zip(kernels, found, strict=True))
    pulls = [by_leaf.get(i, jnp.zeros_like(p)) for i, p in enumerate(parameters)]
    return jnp.asarray(aim.epsilon, gain.dtype) * gain if known else unknown, pulls


def situation(
    chosen: tuple[str, ...],
    aim: Aim,
    count: Array,
    reach: Array,
    loss: Array | None,
    positions: list[LayerPosition],
) -> tuple[Array, ...]:
    """The features that all coordinates share, as one array [f], if any are chosen."""
    parts = []
    if "aim" in chosen:
        parts.append(aim_features(aim))
    if "reach" in chosen:
        parts.append(reach_features(reach))
    if "time" in chosen:
        parts.append(time_features(aim, count))
    if "loss" in chosen:
        parts.append(loss_features(loss, positions))
    return (jnp.concatenate(parts),) if parts else ()
