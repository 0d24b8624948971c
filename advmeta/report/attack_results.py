"""What `advmeta attack` shows of an evaluation: a table, the curve, and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from advmeta.report.plots import Panel, Plot, accuracy_axis, to_png
from advmeta.report.style import COLORS, ROBUST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

COLUMNS = 10  # of the grid of images
GAP = 0.12  # between images, in images
INCHES = 0.9  # an image


def attack_table(results: Mapping) -> Table:
    """Makes a table of results.json: who broke how many, and what is left.

    Args:
      results: with examples, clean_accuracy and points, each with epsilon, robust_accuracy,
        broken_before and broken by attack, as `advmeta attack` writes them.

    Returns:
      A `rich.table.Table`, to be printed on a `rich.console.Console`.
    """
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    for name in ("epsilon", "attack", "breaks", "accuracy"):
        made.add_column(name, justify="left" if name == "attack" else "right")
    made.add_row("", "none", "", f"{results['clean_accuracy']:.3f}")
    for point in results["points"]:
        made.add_section()
        left = results["clean_accuracy"] - point["broken_before"] / results["examples"]
        if point["broken_before"]:
            broken_before = str(point["broken_before"])
            made.add_row("", "at a smaller epsilon", broken_before, f"{left:.3f}")
        for name, broken in point["broken"].items():
            left -= broken / results["examples"]
            made.add_row("", name, str(broken), f"{abs(left):.3f}")
        robust = f"{point['robust_accuracy']:.3f}"
        made.add_row(f"{point['epsilon']:.3g}", "all", "", robust, style="bold green")
    return made


def curve(results: Mapping) -> bytes:
    """Robust accuracy against epsilon as a PNG, from clean accuracy at 0; see `attack_table`."""
    points = {0.0: results["clean_accuracy"]}
    points |= {point["epsilon"]: point["robust_accuracy"] for point in results["points"]}
    xs, ys = zip(*sorted(points.items()), strict=True)

    def draw(ax: Axes) -> None:
        ax.plot(xs, ys, **ROBUST.line, marker=ROBUST.marker, markersize=4, clip_on=False)
        accuracy_axis(ax, "epsilon")

    title = "Robust accuracy"
    return to_png(Plot("curve", title, "", (Panel(title, "", draw),), ()))


def image_grid(x: np.ndarray, x_adv: np.ndarray, names: Sequence[str]) -> bytes:
    """Images above what breaks them above the amplified difference, as a PNG.

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

    def draw(ax: Axes) -> None:
        pitch = 1 + GAP
        for row, images in enumerate(rows.values()):
            for column, image in enumerate(images):
                left, top = column * pitch, row * pitch
                ax.imshow(_rgb(image), extent=(left, left + 1, top + 1, top), vmin=0, vmax=1,
                          cmap="gray", interpolation="nearest")  # fmt: skip
        ax.set_xlim(0, len(x) * pitch - GAP)
        ax.set_ylim(len(rows) * pitch - GAP, 0)
        ax.set_yticks([row * pitch + 0.5 for row in range(len(rows))], rows)
        ax.set_xticks([column * pitch + 0.5 for column in range(len(x))], names)
        ax.tick_params(length=0, labelcolor=COLORS["ink"][0], labelsize=7)
        ax.spines[:].set_visible(False)

    title = "What breaks the model"
    width = (len(x) * (1 + GAP) + 1) * INCHES / 1.5  # `to_png` widens a single panel
    panel = Panel(title, "", draw, width=width, height=(len(rows) * (1 + GAP) + 1) * INCHES)
    return to_png(Plot("images", title, "", (panel,), ()))


def _rgb(image: np.ndarray) -> np.ndarray:
    """Three channels as colours; of any other number the mean."""
    return np.clip(image if image.shape[-1] == 3 else image.mean(axis=-1), 0, 1)
