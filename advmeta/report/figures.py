"""Panels and plots -> a PNG with the panels side by side, and SVGs that flow on the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from advmeta.report.style import COLORS, RC, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

WIDTH, HEIGHT = 4.2, 2.9  # inches of a panel: on a phone it is shown at about its own size
LEGEND_COLUMNS, LEGEND_LINE = 3, 0.22
DPI = 160


class Panel(NamedTuple):
    title: str
    alt: str  # what it shows, in words
    draw: Callable[[Axes], None]
    width: float = WIDTH
    height: float = HEIGHT


class Plot(NamedTuple):
    name: str  # of the file
    heading: str
    caption: str
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, Look], ...]
    markers: bool = False  # the legend shows markers, not lines


def accuracy_axis(ax: Axes, x_name: str) -> None:
    ax.set_ylim(0, 1.02)
    ax.set_xlabel(x_name)
    ax.margins(x=0.01)
    ax.grid(axis="y")


def plain_ticks(axis: Axis) -> None:
    """Numbers on a logarithmic axis as they are, since text is never read as formulas here."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def to_png(plot: Plot) -> bytes:
    """All panels side by side, the legend below them."""
    lines = math.ceil(len(plot.legend) / LEGEND_COLUMNS) * LEGEND_LINE
    width = sum(panel.width for panel in plot.panels) * (1 if len(plot.panels) > 1 else 1.5)
    height = max(panel.height for panel in plot.panels) + lines

    def decorate(figure) -> None:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], label=label, **_handle(look, plot.markers))
            for label, look in plot.legend
        ]
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=LEGEND_COLUMNS,
                          handlelength=2.6)  # fmt: skip

    return _rendered("png", plot.panels, (width, height), decorate)


def _handle(look: Look, marker: bool) -> dict:
    style = look.line | ({"linestyle": "none"} if marker else {})
    return style | {"marker": look.marker if marker else None, "markersize": 6 if look.meta else 5}


def to_svg(panel: Panel) -> str:
    """One panel, to be put into a page: its colours are the page's, and it names no address."""
    svg = _rendered("svg", (panel,), (panel.width, panel.height)).decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (xmlns(:\w+)?|width|height)="[^"]*"', "", svg.split(">", 1)[0]) + (
        ">" + re.sub(r'<g id="[^"]*"', "<g", svg.split(">", 1)[1]).replace("xlink:href", "href")
    )
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for name, (light, _) in COLORS.items():
        svg = svg.replace(light, f"var(--{name})")
    return svg


def _rendered(
    kind: str,
    panels: Sequence[Panel],
    size: tuple[float, float],
    decorate: Callable[..., None] = lambda figure: None,
) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(RC)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, panel in zip(axes, panels, strict=True):
            ax.set_title(panel.title)
            panel.draw(ax)
        decorate(figure)
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata,
                       transparent=kind == "svg")  # fmt: skip
    return buffer.getvalue()
