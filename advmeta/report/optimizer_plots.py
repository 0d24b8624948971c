"""What an optimizer does to the weights: of what `advmeta.evaluation.behaviour` gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from advmeta.report.figures import Panel, Plot, plain_ticks
from advmeta.report.style import COLORS, Look, nth_look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAINING = "in the training of the meta-optimizer's first model in the first column"


def response(seen: Mapping[str, Sequence[Mapping]]) -> Plot:
    """The update against the gradient and against the weight, a colour an optimizer."""
    names = [curve["optimizer"] for curve in seen["against_gradient"]]
    appearance = {name: nth_look(place) for place, name in enumerate(names)}
    panels = (
        _panel("Update down the gradient", "|gradient| / its tensor's rms",
               seen["against_gradient"], appearance, log=True),
        _panel("Update against the weight", "weight / its tensor's rms",
               seen["against_parameter"], appearance, log=False),
    )  # fmt: skip
    caption = (
        f"Updates of single weights, {_TRAINING}; the others are asked for their update of the "
        "same gradients. Lines: median; bands: quartiles."
    )
    return Plot("response", "What the meta-optimizer does", caption, panels,
                tuple(appearance.items()))  # fmt: skip


def _panel(
    title: str, x_name: str, curves: Sequence[Mapping], appearance: Mapping[str, Look], *, log: bool
) -> Panel:
    def draw(ax: Axes) -> None:
        for curve in curves:
            look = appearance[curve["optimizer"]]
            ax.plot(curve["x"], curve["median"], **dict(look.line, linewidth=1.6))
            ax.fill_between(curve["x"], curve["low"], curve["high"], color=COLORS[look.color][0],
                            alpha=0.16, linewidth=0, zorder=2)  # fmt: skip
        ax.axhline(0, color=COLORS["muted"][0], linewidth=0.7)
        if log:
            ax.set_xscale("log")
            plain_ticks(ax.xaxis)
        ax.set_xlabel(x_name)
        ax.grid(axis="y")
        ax.margins(x=0.01)

    ends = ", ".join(
        f"{c['optimizer']} {c['median'][0]:.2g} to {c['median'][-1]:.2g}" for c in curves
    )
    return Panel(title, f"{title} against {x_name}. From left to right: {ends}.", draw)


def effective_steps(lines: Sequence[Mapping]) -> Plot:
    """Update over weight along the training: a colour an optimizer, a dash a layer."""
    names = list(dict.fromkeys(line["optimizer"] for line in lines))
    layers = list(dict.fromkeys(line["layer"] for line in lines))
    appearance = {
        (line["optimizer"], line["layer"]): nth_look(
            layers.index(line["layer"]), nth_look(names.index(line["optimizer"])).color
        )
        for line in lines
    }

    def draw(ax: Axes) -> None:
        for line in lines:
            look = appearance[line["optimizer"], line["layer"]]
            ax.plot(line["steps"], line["share"], **dict(look.line, linewidth=1.6))
        ax.set_yscale("log")
        plain_ticks(ax.yaxis)
        ax.set_xlabel("inner steps")
        ax.grid(axis="y")
        ax.margins(x=0.01)

    ends = ", ".join(f"{x['optimizer']} {x['layer']} {x['share'][-1]:.2g}" for x in lines)
    alt = f"Effective step of each layer against inner steps. At the end: {ends}."
    panel = Panel("Effective step", alt, draw)
    caption = f"The rms of the update over the rms of the weights, layer by layer, {_TRAINING}."
    legend = tuple((f"{name}, {layer}", look) for (name, layer), look in appearance.items())
    return Plot("effective_step", "Effective step of each layer", caption, (panel,), legend)
