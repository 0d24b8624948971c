"""What the transfer table is made of: its columns, its rows, and how each is measured."""

import dataclasses
from typing import Literal

from advmeta import optimizees
from advmeta.attacks.threat_model import ThreatModel
from advmeta.evaluation.baselines import QUICK_ROWS, ROWS
from advmeta.inner_gradients import RECIPES
from advmeta.types import Norm


@dataclasses.dataclass(frozen=True)
class Cell:
    """A column of the table: one architecture on one data set.

    Args:
      setting: what is new in it, for people.
      dataset, optimizee, norm, epsilon: as in `TaskConfig`.
      train_examples: drawn from the training set; None: all of it.
    """

    setting: str
    dataset: str
    optimizee: str
    epsilon: float
    norm: Norm = "linf"
    train_examples: int | None = None

    def __post_init__(self):
        ThreatModel(self.norm, self.epsilon)
        optimizees.by_name(self.optimizee)


CELLS = (
    Cell("same architecture", "digits", "mlp-20", 0.1),
    Cell("wider", "digits", "mlp-40", 0.1),
    Cell("deeper", "digits", "mlp-20-20", 0.1),
    Cell("other activation", "digits", "mlp-20-tanh", 0.1),
    Cell("CNN", "digits", "cnn-4-8", 0.1),
    Cell("other data set", "fashion_small", "mlp-20", 0.05),
)


@dataclasses.dataclass(frozen=True)
class TransferConfig:
    """How the table is made.

    Args:
      cells: its columns.
      rows: names of its rows, of `baselines.ROWS`; the meta-optimizer's come after them.
      inner_gradients: of the meta-optimizer's rows, of `RECIPES`; the first one's models are those
        that are looked at closely.
      inner_steps: of every row alike.
      batch_size: examples an inner step.
      seeds: models trained for each entry; mean and spread are over them.
      tuning_seeds: models trained for each point of a baseline's grid; more where it is small.
      validation: fraction of the training set on which the grid is judged.
      attack: what gives robust accuracy on the test set, "pgd" or "autoattack"; the second, its
        standard version, comes with PGD's number beside it.
      attack_steps, restarts: of that PGD, which raises the margin.
    """

    cells: tuple[Cell, ...] = CELLS
    rows: tuple[str, ...] = QUICK_ROWS
    inner_gradients: tuple[str, ...] = ("clean",)
    inner_steps: int = 200
    batch_size: int = 128
    seeds: int = 3
    tuning_seeds: int = 2
    validation: float = 0.2
    attack: Literal["pgd", "autoattack"] = "pgd"
    attack_steps: int = 40
    restarts: int = 3

    def __post_init__(self):
        unknown = [name for name in self.rows if name not in ROWS]
        if unknown:
            raise ValueError(f"rows={unknown} are unknown; the known ones are {list(ROWS)}")
        unknown = [name for name in self.inner_gradients if name not in RECIPES]
        if unknown or not self.inner_gradients:
            raise ValueError(
                f"inner_gradients={self.inner_gradients}: {unknown or 'none'} cannot be used; the "
                f"known ones are {list(RECIPES)}, and there must be at least one"
            )
        if self.attack not in ("pgd", "autoattack"):
            raise ValueError(f"attack={self.attack!r} is unknown; write 'pgd' or 'autoattack'")
        for name in ("inner_steps", "seeds", "tuning_seeds", "attack_steps", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def entries(self) -> int:
        """Rows, the meta-optimizer's too."""
        return len(self.rows) + len(self.inner_gradients)
