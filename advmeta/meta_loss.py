"""What the outer step minimises: a scalar of the trajectory."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from advmeta.held_out import LOSSES
from advmeta.types import Array
from advmeta.unroll import Trajectory


@dataclasses.dataclass(frozen=True)
class MetaLossConfig:
    """The weights of the parts of the meta-loss.

    Args:
      adversarial_weight: of the loss on attacked held-out examples.
      clean_weight: of the loss on the same kind of examples, not attacked.
      attack_steps: PGD steps that attack them.
      every: inner steps between two looks at held-out examples; None: one look, at the end of a
        truncation.
      examples: drawn for a look.
      lateness: k of ``(k + 1) p^k``, the weight of a step at the share p of its episode; 0 weighs
        all alike.
      cap: each loss is clipped here, so that an episode that diverges cannot drown the others.
        10 classes at chance have a loss of 2.3.
      loss: of `advmeta.held_out.LOSSES`: "cross_entropy"; "calibrated", which does not depend on
        the scale of the logits; or "error", the share of wrong answers, for an estimator that needs
        no gradient.
    """

    adversarial_weight: float = 1.0
    clean_weight: float = 0.3
    attack_steps: int = 8
    every: int | None = None
    examples: int = 200
    lateness: float = 2.0
    cap: float = 5.0
    loss: Literal["cross_entropy", "calibrated", "error"] = "error"

    def __post_init__(self) -> None:
        weights = (self.adversarial_weight, self.clean_weight)
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"adversarial_weight, clean_weight = {weights}: none may be negative and one must "
                "be positive"
            )
        for name in ("attack_steps", "every", "examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not self.cap > 0 or not self.lateness >= 0:
            raise ValueError(
                f"cap={self.cap} must be positive, lateness={self.lateness} not negative"
            )
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is unknown; the known ones are {list(LOSSES)}")


def meta_loss(config: MetaLossConfig, trajectory: Trajectory, progress: Array) -> Array:
    """The mean over the looks of the weighted, capped losses on held-out examples.

    ``mean_t (k + 1) p_t^k ( w_adv min(L_adv(theta_{t+1}), cap)
    + w_clean min(L_clean(theta_{t+1}), cap) )``

    Args:
      config: weights and cap.
      trajectory: with a `HeldOutLoss` in ``evaluation``, [looks] each.
      progress: p, the share of the episode that is over at each, [looks].

    Reference:
      The sum of losses over the unroll is eq. 3 of Andrychowicz et al. 2016 (arXiv:1606.04474)
      with weights w_t; adversarial losses in it are Serban et al. 2020.
    """
    losses = trajectory.evaluation
    adversarial = jnp.minimum(losses.adversarial, config.cap)
    clean = jnp.minimum(losses.clean, config.cap)
    loss = config.adversarial_weight * adversarial + config.clean_weight * clean
    if config.lateness:
        loss *= (config.lateness + 1) * progress**config.lateness
    return loss.mean()
