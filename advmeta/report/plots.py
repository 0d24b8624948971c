"""What a run left -> plots: panels that stand side by side in a PNG and flow on the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from advmeta.report.records import SAME, Transfer, number, row_of, summarise, transfer
from advmeta.report.style import CLEAN, COLORS, PLAIN, RC, ROBUST, Look, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from advmeta.report.folder import Run

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


def plots(run: Run) -> list[Plot]:
    """The plots that the run has numbers for."""
    learning, epsilon = run.curves.get("learning"), run.curves.get("epsilon")
    made = [
        _transfer(transfer(run.results)) if run.results else None,
        _learning(learning) if learning else None,
        _epsilon(epsilon, run.results) if epsilon else None,
        _meta_training(run.metrics) if run.metrics else None,
    ]
    return [plot for plot in made if plot is not None]


def _learning(records: Sequence[Mapping]) -> Plot:
    panels = tuple(
        _curves(title, "inner steps", records, "steps", key)
        for title, key in (("Clean accuracy", "clean_accuracy"),
                           ("Robust accuracy", "robust_accuracy"))
    )  # fmt: skip
    caption = f"While a model is trained, robust under PGD, same architecture{_band(records)}."
    return Plot("learning_curves", "Learning curves", caption, panels, _legend(records))


def _epsilon(records: Sequence[Mapping], results: Sequence[Mapping]) -> Plot:
    trained = {r["epsilon"] for r in results if r.get("setting") == SAME and r.get("epsilon")}
    panel = _curves("Robust accuracy", "epsilon of the attack", records, "epsilons",
                    "robust_accuracy", trained)  # fmt: skip
    caption = f"Under PGD with perturbations of each size, same architecture{_band(records)}" + (
        "; vertical: the epsilon of the table." if trained else "."
    )
    return Plot("epsilon", "Robustness against epsilon", caption, (panel,), _legend(records))


def _legend(records: Sequence[Mapping]) -> tuple[tuple[str, Look], ...]:
    return tuple((row.label, look) for row, look in looks(map(row_of, records)).items())


def _band(records: Sequence[Mapping]) -> str:
    several = len(set(map(row_of, records))) < len(records)
    return "; bands: one standard deviation over the seeds" if several else ""


def _curves(
    title: str, x_name: str, records: Sequence[Mapping], x: str, y: str, marks: Collection = ()
) -> Panel:
    """One curve a row: the mean over its seeds, in a band of one standard deviation."""
    appearance = looks(map(row_of, records))
    curves = {row: mean_curve([r for r in records if row_of(r) == row], x, y) for row in appearance}

    def draw(ax: Axes) -> None:
        for mark in marks:
            ax.axvline(mark, color=COLORS["muted"][0], linewidth=0.8, linestyle=(0, (2, 2)))
        for row, (xs, means, spreads) in curves.items():
            look = appearance[row]
            ax.plot(xs, means, **look.line)
            ax.fill_between(xs, means - spreads, means + spreads, color=COLORS[look.color][0],
                            alpha=0.16, linewidth=0, zorder=2)  # fmt: skip
        accuracy_axis(ax, x_name)

    ends = ", ".join(f"{row.label} {ys[-1]:.3f}" for row, (_, ys, _) in curves.items() if len(ys))
    return Panel(title, f"{title} against {x_name}. At the end: {ends}.", draw)


def mean_curve(
    records: Sequence[Mapping], x: str, y: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and spread over the seeds, at the points that all of them have."""
    seeds = [dict(zip(map(float, r[x]), r[y], strict=True)) for r in records]
    xs = sorted(set.intersection(*map(set, seeds)))
    summaries = [summarise(seed[at] for seed in seeds) for at in xs]
    means = np.array([summary.mean for summary in summaries])
    return np.array(xs), means, np.array([summary.spread for summary in summaries])


def accuracy_axis(ax: Axes, x_name: str) -> None:
    ax.set_ylim(0, 1.02)
    ax.set_xlabel(x_name)
    ax.margins(x=0.01)
    ax.grid(axis="y")


def _meta_training(metrics: Sequence[Mapping]) -> Plot:
    panels = [_series("Meta-loss", metrics, {"meta_loss": PLAIN})]
    accuracies = {"clean_accuracy": CLEAN, "robust_accuracy": ROBUST}
    present = {key: look for key, look in accuracies.items()
               if any(record.get(key) is not None for record in metrics)}  # fmt: skip
    if present:
        panels.append(_series("Accuracy on held-out tasks", metrics, present))
    legend = tuple((key.replace("_", " "), look) for key, look in present.items())
    caption = "The meta-loss, and models trained by the meta-optimizer on tasks held out."
    return Plot("meta_training", "Meta-training", caption, tuple(panels), legend)


def _series(title: str, metrics: Sequence[Mapping], keys: Mapping[str, Look]) -> Panel:
    def points(key: str) -> tuple[list[float], list[float]]:
        known = [r for r in metrics if r.get(key) is not None]
        return [number(r["outer_step"]) for r in known], [number(r[key]) for r in known]

    def draw(ax: Axes) -> None:
        for key, look in keys.items():
            xs, ys = points(key)
            style: dict[str, Any] = look.line | {"linewidth": 1.6}
            ax.plot(xs, ys, **style, marker="o" if len(xs) < 30 else None, markersize=3)
        ax.margins(x=0.03)
        ax.set_xlabel("outer steps")
        ax.grid(axis="y")
        if keys.keys() != {"meta_loss"}:
            ax.set_ylim(0, 1.02)

    last = [f"{key.replace('_', ' ')} {points(key)[1][-1]:.3f}" for key in keys if points(key)[1]]
    return Panel(title, f"{title} against outer steps. At the end: {', '.join(last)}.", draw)


def _transfer(layout: Transfer) -> Plot:
    """A band for each setting, in it a dot for each row, the meta-optimizer's on top."""
    appearance = looks(layout.rows)
    pitch = 1 / (len(layout.rows) + 1.5)  # of the dots, in bands

    def draw(ax: Axes) -> None:
        for place, column in enumerate(layout.columns):
            if place:
                ax.axhline(place - 0.5, color=COLORS["grid"][0], linewidth=0.7)
            for slot, row in enumerate(reversed(layout.rows)):
                if (row, column) in layout.cells:
                    y = place + (slot - (len(layout.rows) - 1) / 2) * pitch
                    _dot(ax, layout.cells[row, column].robust, y, appearance[row])
        ax.set_ylim(len(layout.columns) - 0.5, -0.5)
        names = ["\n".join(layout.header(column)[:3]) for column in layout.columns]
        ax.set_yticks(range(len(names)), names, linespacing=1.25)
        ax.tick_params(axis="y", length=0, labelcolor=COLORS["ink"][0], labelsize=8)
        ax.spines["left"].set_visible(False)
        ax.set_xlim(left=0)
        ax.grid(axis="x")
        ax.set_xlabel("robust accuracy")

    height = 0.75 + len(layout.columns) * max(0.55, 0.095 * (len(layout.rows) + 1.5))
    alt = "Robust accuracy of every row of the transfer table, setting by setting."
    panel = Panel("Robust accuracy", alt, draw, height=height)
    several = any(cell.robust.count > 1 for cell in layout.cells.values())
    caption = "Robust accuracy in each setting" + (
        "; whiskers: one standard deviation over the seeds." if several else "."
    )
    legend = tuple((row.label, appearance[row]) for row in reversed(layout.rows))
    return Plot("transfer", "Transfer", caption, (panel,), legend, markers=True)


def _dot(ax: Axes, robust, y: float, look: Look) -> None:
    spread = robust.spread if math.isfinite(robust.spread) else None
    ax.errorbar(robust.mean, y, xerr=spread, color=COLORS[look.color][0], elinewidth=look.width / 2,
                marker=look.marker, markersize=6.5 if look.meta else 4.5, linestyle="none",
                zorder=4 if look.meta else 3)  # fmt: skip


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
