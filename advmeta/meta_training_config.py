"""What decides a meta-training."""

import dataclasses
from typing import Literal

from advmeta import inner_gradients
from advmeta.meta_loss import MetaLossConfig
from advmeta.meta_optimizer.rule import MetaOptimizerConfig
from advmeta.task_families import TaskConfig


@dataclasses.dataclass(frozen=True)
class MetaTrainingConfig:
    """Everything that decides the meta-parameters, but for the key.

    Args:
      tasks: what is trained on; every outer step takes all of them.
      selection: what the best meta-parameters are chosen on.
      meta_optimizer: what the LSTM sees and how large it is.
      initial: the weights to begin with, a name or a file that `load_meta_optimizer` knows; None:
        fresh ones. They keep no constant of their own: the rule's are those of ``meta_optimizer``.
      meta_loss: what is minimised.
      inner_gradient: a name that `advmeta.inner_gradients.by_name` knows.
      outer_steps: updates of the meta-parameters.
      lanes: episodes of each task that run side by side.
      truncation: inner steps of one outer step, which backpropagation goes back through.
      horizon: shortest and longest episode, in inner steps; each is drawn from the multiples of
        the truncation between them.
      horizon_known: share of the episodes that the feature "time" knows the horizon of.
      estimator: of the meta-gradient: "pes", persistent evolution strategies, which counts all that
        an update does to the rest of its episode; "nres", the same with one perturbation an
        episode; or "backpropagation" through one truncation, which is less noisy and counts what is
        left when gradients are given.
      sigma: standard deviation of the perturbations of "pes" and "nres".
      recompute: what backpropagation computes once more in the place of keeping it in memory: each
        inner "step", or "nothing", for machines whose memory is faster than their arithmetic.
      learning_rate: of the outer AdamW, at its start; it follows a cosine to zero.
      weight_decay: of the readout and the linear map (as in AdamW): towards the nominal rule, where
        few tasks say anything.
      clip: global norm that meta-gradients are clipped to.
      average: decay of the moving average of the meta-parameters, which is what is evaluated.
      evaluate_every: outer steps between evaluations.
    """

    tasks: tuple[TaskConfig, ...] = (
        TaskConfig(optimizee="linear"),
        TaskConfig(optimizee="mlp-10"),
        TaskConfig(optimizee="mlp-20"),
    )
    selection: tuple[TaskConfig, ...] = (
        TaskConfig(optimizee="mlp-24", train_examples=800),
        TaskConfig(optimizee="mlp-24-16", train_examples=800),
    )
    meta_optimizer: MetaOptimizerConfig = MetaOptimizerConfig()
    initial: str | None = None
    meta_loss: MetaLossConfig = MetaLossConfig()
    inner_gradient: str = "clean"
    outer_steps: int = 100
    lanes: int = 4
    truncation: int = 100
    horizon: tuple[int, int] = (100, 200)
    horizon_known: float = 0.75
    estimator: Literal["pes", "nres", "backpropagation"] = "pes"
    sigma: float = 8e-3
    recompute: Literal["step", "nothing"] = "step"
    learning_rate: float = 1.5e-3
    weight_decay: float = 2.0
    clip: float = 1.0
    average: float = 0.98
    evaluate_every: int = 20

    def __post_init__(self) -> None:
        inner_gradients.by_name(self.inner_gradient)
        for name in ("outer_steps", "lanes", "truncation", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        shortest, longest = self.horizon
        if shortest % self.truncation or longest % self.truncation:
            raise ValueError(
                f"truncation={self.truncation} must divide both ends of horizon={self.horizon}; "
                f"write horizon=({self.truncation}, {self.truncation * 10}), say"
            )
        if not 0 < shortest <= longest:
            raise ValueError(f"horizon={self.horizon} must be (shortest, longest), both positive")
        if not self.tasks or not self.selection:
            raise ValueError("tasks and selection must each hold at least one TaskConfig")
        if self.truncation % (self.meta_loss.every or 1):
            raise ValueError(
                f"meta_loss.every={self.meta_loss.every} must divide truncation={self.truncation}"
            )
        if self.meta_loss.loss == "error" and self.estimator == "backpropagation":
            raise ValueError(
                "meta_loss.loss='error' has no gradient, which estimator='backpropagation' needs: "
                "write loss='calibrated', or estimator='pes'"
            )
        if self.estimator not in ("backpropagation", "pes", "nres") or not self.sigma > 0:
            raise ValueError(
                f"estimator={self.estimator!r} must be 'pes', 'nres' or 'backpropagation', and "
                f"sigma={self.sigma} positive"
            )
        if self.recompute not in ("step", "nothing"):
            raise ValueError(f"recompute={self.recompute!r} must be 'step' or 'nothing'")
        if not 0 <= self.horizon_known <= 1:
            raise ValueError(f"horizon_known={self.horizon_known} is a share, from 0 to 1")
        if not 0 <= self.average < 1:
            raise ValueError(f"average={self.average} must be at least 0 and below 1")
