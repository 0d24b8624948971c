"""What attacks share that look for the nearest adversarial example (FAB, Carlini-Wagner)."""

from typing import NamedTuple

import jax.numpy as jnp

from advmeta.attacks.batching import choose
from advmeta.attacks.threat_model import ThreatModel
from advmeta.attacks.validation import AttackResult
from advmeta.types import Array


class Found(NamedTuple):
    """The nearest adversarial point so far; x itself, infinitely far, before there is one."""

    x_adv: Array  # [n, ...]
    distance: Array  # [n], inf for none
    loss: Array  # [n], the margin at x_adv

    def nearer(self, other: "Found", where: Array) -> "Found":
        """Takes the other's examples that are nearer, among those of the mask ``where`` [n]."""
        return choose(where & (other.distance < self.distance), other, self)


def nothing_yet(x: Array, margin: Array) -> Found:
    """The state to start a search from, with the margin of the clean examples [n]."""
    return Found(x, jnp.full(x.shape[:1], jnp.inf, x.dtype), margin)


def hand_out(found: Found, clean: Found, threat_model: ThreatModel) -> AttackResult:
    """The points found within epsilon, and the clean example elsewhere; all distances."""
    within = found.distance <= jnp.asarray(threat_model.epsilon, clean.x_adv.dtype)
    given = choose(within, found, clean)
    return AttackResult(given.x_adv, within, given.loss, found.distance)
