"""How things look: colour says what the inner gradient is, dash and marker which optimizer.

The training recipes have one colour, and in it dash and marker say which of them it is.
The hues are those of Okabe and Ito, which colour-blind people tell apart; the lighter ones are for
a dark page.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from advmeta.report.records import Row, in_order

COLORS = {  # name: on white, on a dark page
    "ink": ("#1f2328", "#e6e8eb"),
    "muted": ("#5c6470", "#9aa4b0"),
    "grid": ("#dfe3e8", "#333a42"),
    "paper": ("#ffffff", "#15181c"),
    "tint": ("#fdf1e8", "#33241a"),
    "meta": ("#d55e00", "#ff8a3d"),
    "clean": ("#0072b2", "#56b4e9"),
    "noisy": ("#cc79a7", "#e3a1c6"),
    "adversarial": ("#009e73", "#35c79c"),
    "other": ("#e69f00", "#f2c14e"),
}
DASHES = (None, (5, 2), (1.2, 1.6), (6, 2, 1.2, 2), (9, 2), (6, 2, 1.2, 2, 1.2, 2))
MARKERS = ("o", "s", "^", "v", "P", "X")
META_MARKER = "D"

RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.labelcolor": COLORS["muted"][0],
    "axes.titlecolor": COLORS["ink"][0],
    "axes.edgecolor": COLORS["muted"][0],
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": COLORS["muted"][0],
    "ytick.color": COLORS["muted"][0],
    "grid.color": COLORS["grid"][0],
    "grid.linewidth": 0.7,
    "text.parse_math": False,  # a name may hold a dollar sign
    "text.color": COLORS["ink"][0],
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "figure.facecolor": COLORS["paper"][0],
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "svg.hashsalt": "advmeta",  # the same run gives the same file
}


class Look(NamedTuple):
    """Of one row in every plot."""

    color: str  # a name of COLORS
    dash: tuple[float, ...] | None
    marker: str
    meta: bool

    @property
    def width(self) -> float:
        return 2.4 if self.meta else 1.3

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of `Axes.plot`."""
        return {
            "color": COLORS[self.color][0],
            "linestyle": (0, self.dash) if self.dash else "-",
            "linewidth": self.width,
            "zorder": 4 if self.meta else 3,
        }


PLAIN = Look("muted", None, "o", False)
CLEAN = Look("clean", (5, 2), "o", False)
ROBUST = Look("meta", None, "o", False)


def nth_look(place: int, color: str | None = None) -> Look:
    """For lines that are no rows: another colour for each, and then another dash; or that colour
    and another dash for each."""
    names = ("meta", "clean", "adversarial", "noisy", "other") if color is None else (color,)
    turn, which = divmod(place, len(names))
    return Look(names[which], DASHES[turn % len(DASHES)], "o", False)


def looks(rows: Iterable[Row]) -> dict[Row, Look]:
    """A look for every row, in the order of the table."""
    rows = in_order(rows)
    counts = Counter(row.optimizer for row in rows if not row.meta)
    baselines = [name for name, _ in counts.most_common()]  # the solid line for the commonest
    return {row: _look(row, rows, baselines) for row in rows}


def _look(row: Row, rows: tuple[Row, ...], baselines: list[str]) -> Look:
    if row.meta:
        place = [other for other in rows if other.meta].index(row)
        return Look("meta", DASHES[place % len(DASHES)], META_MARKER, True)
    named = ("clean", "noisy", "adversarial")
    if row.inner_gradient in named:
        color, place = row.inner_gradient, baselines.index(row.optimizer)
    else:
        others = [r for r in rows if not r.meta and r.inner_gradient not in named]
        color, place = "other", others.index(row)
    return Look(color, DASHES[place % len(DASHES)], MARKERS[place % len(MARKERS)], False)


def css_variables() -> str:
    """COLORS as custom properties, for a light and for a dark page."""
    light, dark = (
        " ".join(f"--{name}: {pair[place]};" for name, pair in COLORS.items()) for place in (0, 1)
    )
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    )
