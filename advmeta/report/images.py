"""Images above what breaks a model on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from advmeta.report.figures import Panel, Plot
from advmeta.report.style import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS, PANEL_COLUMNS = 10, 5  # images in all, and side by side
GAP = 0.12  # between images, in images
INCHES = 0.6  # an image


def twins(found: Mapping[str, Sequence]) -> Plot:
    """Of what `advmeta.evaluation.twins` gives."""
    names = [f"{y} → {z}" for y, z in zip(found["label"], found["prediction"], strict=True)]
    caption = (
        "The first test images that PGD breaks, of the meta-optimizer's first model in the first "
        "column: label → what the model says of the adversarial image."
    )
    x, x_adv = (np.asarray(found[name], float) for name in ("x", "x_adv"))
    return image_grid(x, x_adv, names)._replace(heading="Adversarial twins", caption=caption)


def image_grid(x: np.ndarray, x_adv: np.ndarray, names: Sequence[str]) -> Plot:
    """Images above what breaks them above the amplified difference.

    In the difference grey is no change, and the largest one is black or white.

    Args:
      x: images [n, h, w, c] in [0, 1], of which the first ten are shown.
      x_adv: the adversarial ones.
      names: what to write below each.
    """
    x, x_adv, names = x[:COLUMNS], x_adv[:COLUMNS], names[:COLUMNS]
    difference = x_adv - x
    factor = 0.5 / max(np.abs(difference).max(), 1e-12)
    rows = {
        "clean": x,
        "adversarial": x_adv,
        f"difference\nx {factor:.3g}": 0.5 + factor * difference,
    }
    title = "What breaks the model"
    panels = tuple(
        _grid(title if start == 0 else " ", {k: v[start : start + PANEL_COLUMNS] for k, v in
              rows.items()}, names[start : start + PANEL_COLUMNS])
        for start in range(0, len(x), PANEL_COLUMNS)
    )  # fmt: skip
    return Plot("images", title, "", panels, ())


def _grid(title: str, rows: Mapping[str, np.ndarray], names: Sequence[str]) -> Panel:
    pitch = 1 + GAP

    def draw(ax: Axes) -> None:
        for row, images in enumerate(rows.values()):
            for column, image in enumerate(images):
                left, top = column * pitch, row * pitch
                ax.imshow(_rgb(image), extent=(left, left + 1, top + 1, top), vmin=0, vmax=1,
                          cmap="gray", interpolation="nearest")  # fmt: skip
        ax.set_xlim(0, len(names) * pitch - GAP)
        ax.set_ylim(len(rows) * pitch - GAP, 0)
        ax.set_yticks([row * pitch + 0.5 for row in range(len(rows))], rows)
        ax.set_xticks([column * pitch + 0.5 for column in range(len(names))], names)
        ax.tick_params(length=0, labelcolor=COLORS["ink"][0])
        ax.spines[:].set_visible(False)

    alt = f"{len(names)} images, their adversarial twins, and the differences."
    width = (len(names) * pitch + 1.2) * INCHES
    return Panel(title, alt, draw, width, (len(rows) * pitch + 1) * INCHES)


def _rgb(image: np.ndarray) -> np.ndarray:
    """Three channels as colours; of any other number the mean."""
    return np.clip(image if image.shape[-1] == 3 else image.mean(axis=-1), 0, 1)
