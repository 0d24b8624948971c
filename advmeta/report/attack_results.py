"""What `advmeta attack` shows of an evaluation: a table and the curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from advmeta.report.figures import Panel, Plot, accuracy_axis, to_png
from advmeta.report.style import ROBUST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table


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
