"""Persistent evolution strategies: a meta-gradient without backpropagation and without its bias."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from advmeta.types import Array, Key, MetaParams, PyTree


class Persistent(NamedTuple):
    """What an episode carries from one truncation to the next, beside its own inner state."""

    twin: PyTree  # the inner state of the same episode under the opposite perturbations
    perturbation: MetaParams  # xi: the sum of those of the episode so far


def begin(inner: PyTree, meta_params: MetaParams) -> Persistent:
    """At the start of an episode nothing is perturbed yet."""
    return Persistent(inner, optax.tree.zeros_like(meta_params))


def estimate(
    sigma: float, reuse: bool, runs: tuple, meta_params: MetaParams, lanes: tuple, key: Key
) -> tuple[Array, MetaParams, tuple]:
    """The meta-gradient from pairs of opposite perturbations, as an `Estimator`.

    In each lane a pair of twins lives through the same episode. For the next truncation

    ``epsilon ~ N(0, sigma^2 I)``,  ``L+, s+ = unroll(s+, phi + epsilon)``,
    ``L-, s- = unroll(s-, phi - epsilon)``,  ``xi <- xi + epsilon``,
    ``g = xi (L+ - L-) / (2 sigma^2)``

    Since xi holds the perturbations of all truncations of the episode, g counts what an early one
    does to a late loss, which backpropagation through one truncation does not. Summed over an
    episode it is, in expectation, the gradient of the whole one, smoothed over sigma; and it goes
    through the inner gradients and the attack, too. Its variance grows with the number of
    truncations. With ``reuse`` an episode has one epsilon, which is drawn where it starts, and
    ``xi = epsilon``: the same in expectation, and less noisy where truncations want different
    changes of phi.

    Args:
      sigma: standard deviation of the perturbations.
      reuse: whether an episode keeps its perturbation.
      runs, meta_params, lanes, key: see `advmeta.outer_step.Estimator`; each lane has its
        `Persistent`.

    Returns:
      The mean loss of the twins, g, and the lanes, each a mean over lanes and families.

    Reference:
      Vicol et al. 2021, Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent
      Evolution Strategies, algorithm 2. arXiv:2112.13835. With ``reuse``: Li et al. 2023,
      Variance-Reduced Gradient Estimation via Noise-Reuse in Online Evolution Strategies.
      arXiv:2304.12180
    """

    def one_lane(run, lane, key):
        # The key of the lane is that of its episode.
        noise_key = jax.random.fold_in(lane.key, 3) if reuse else key
        epsilon = optax.tree.scale(sigma, optax.tree.random_like(noise_key, meta_params))

        def perturbed(sign, inner):
            phi = optax.tree.add_scale(meta_params, sign, epsilon)
            return run(phi, lane._replace(inner=inner))

        twins = jax.tree.map(lambda *pair: jnp.stack(pair), lane.inner, lane.persistent.twin)
        losses, after = jax.vmap(perturbed)(jnp.array([1.0, -1.0]), twins)
        plus, minus = (jax.tree.map(lambda leaf, i=i: leaf[i], after.inner) for i in (0, 1))
        xi = epsilon if reuse else optax.tree.add(lane.persistent.perturbation, epsilon)
        gradient = optax.tree.scale((losses[0] - losses[1]) / (2 * sigma**2), xi)
        lane = lane._replace(inner=plus, persistent=Persistent(minus, xi))
        return (losses.mean(), gradient), lane

    means, after = [], []
    family_keys = jax.random.split(key, len(runs))
    for run, family_lanes, family_key in zip(runs, lanes, family_keys, strict=True):
        keys = jax.random.split(family_key, family_lanes.horizon.shape[0])
        results, family_lanes = jax.vmap(functools.partial(one_lane, run))(family_lanes, keys)
        means.append(jax.tree.map(lambda leaf: leaf.mean(axis=0), results))
        after.append(family_lanes)
    loss, gradient = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *means)
    return loss, gradient, tuple(after)
