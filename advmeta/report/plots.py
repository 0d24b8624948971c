"""What a run left -> its plots."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from advmeta.report.figures import Panel, Plot, accuracy_axis
from advmeta.report.images import twins
from advmeta.report.optimizer_plots import effective_steps, response
from advmeta.report.records import SAME, Transfer, number, row_of, summarise, transfer
from advmeta.report.style import CLEAN, COLORS, PLAIN, ROBUST, Look, looks, nth_look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from advmeta.report.folder import Run


def plots(run: Run) -> list[Plot]:
    """The plots that the run has numbers for."""
    learning, epsilon = run.curves.get("learning"), run.curves.get("epsilon")
    made = [
        _transfer(transfer(run.results)) if run.results else None,
        _learning(learning) if learning else None,
        _epsilon(epsilon, run.results) if epsilon else None,
        _meta_training(run.metrics) if run.metrics else None,
        response(run.behaviour) if run.behaviour else None,
        effective_steps(run.behaviour["effective_step"]) if run.behaviour else None,
        twins(run.twins) if run.twins.get("x") else None,
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


def _meta_training(metrics: Sequence[Mapping]) -> Plot:
    """Of one run: clean and robust in one panel; of several, a colour a run."""
    runs = {run: [r for r in metrics if r.get("run") == run]
            for run in dict.fromkeys(r.get("run") for r in metrics)}  # fmt: skip
    caption = "The meta-loss, and models trained by the meta-optimizer on tasks held out."
    accuracies = {"clean_accuracy": CLEAN, "robust_accuracy": ROBUST}
    present = {key: look for key, look in accuracies.items()
               if any(record.get(key) is not None for record in metrics)}  # fmt: skip
    if len(runs) == 1:
        panels = [_series("Meta-loss", [("meta_loss", metrics, "meta_loss", PLAIN)])]
        lines = [(_words(key), metrics, key, look) for key, look in present.items()]
        panels += [_series("Accuracy on held-out tasks", lines)] if lines else []
        legend = tuple((name, look) for name, _, _, look in lines)
    else:
        legend = tuple((str(run), nth_look(place)) for place, run in enumerate(runs))
        panels = []
        for key in ("meta_loss", *present):
            lines = [(name, runs[name], key, look) for name, look in legend]
            panels.append(_series(_words(key).capitalize(), lines))
    return Plot("meta_training", "Meta-training", caption, tuple(panels), legend)


def _words(key: str) -> str:
    return key.replace("meta_loss", "meta-loss").replace("_", " ")


def _series(title: str, lines: Sequence[tuple[str, Sequence[Mapping], str, Look]]) -> Panel:
    """Lines of (name, records, key, look) against outer steps."""

    def points(records: Sequence[Mapping], key: str) -> tuple[list[float], list[float]]:
        known = [r for r in records if r.get(key) is not None]
        return [number(r["outer_step"]) for r in known], [number(r[key]) for r in known]

    def draw(ax: Axes) -> None:
        for _, records, key, look in lines:
            xs, ys = points(records, key)
            style = dict(look.line, linewidth=1.6)
            ax.plot(xs, ys, **style, marker="o" if len(xs) < 30 else None, markersize=3)
        ax.margins(x=0.03)
        ax.set_xlabel("outer steps")
        ax.grid(axis="y")
        if all(key != "meta_loss" for _, _, key, _ in lines):
            ax.set_ylim(0, 1.02)

    ends = [(name, points(records, key)[1]) for name, records, key, _ in lines]
    last = ", ".join(f"{name} {values[-1]:.3f}" for name, values in ends if values)
    return Panel(title, f"{title} against outer steps. At the end: {last}.", draw)


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
        attacks = {column.attack for column in layout.columns} - {""}
        ax.set_xlabel("robust accuracy" + (f", {attacks.pop()}" if len(attacks) == 1 else ""))

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
