"""One HTML page that needs nothing but itself. All text from files passes through `_text`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources

from advmeta.report.figures import Plot, to_svg
from advmeta.report.folder import Run
from advmeta.report.records import SAME, Cell, Row, Transfer, column_of, flat, row_of, transfer
from advmeta.report.style import Look, css_variables
from advmeta.report.tables import CHECK_COLUMNS, COSTS, check_cells

PX = 96 * 1.15  # CSS pixels that an inch of a panel may take
SHAPES = {  # of the markers, in a box of 10
    "o": "M5 1.5a3.5 3.5 0 1 0 .01 0z",
    "s": "M2 2h6v6h-6z",
    "^": "M5 1.2l4 7.3h-8z",
    "v": "M5 8.8l4-7.3h-8z",
    "P": "M4 1.5h2v2.5h2.5v2h-2.5v2.5h-2v-2.5h-2.5v-2h2.5z",
    "D": "M5 .2l4.8 4.8l-4.8 4.8l-4.8-4.8z",
}


def page(run: Run, plots: Sequence[Plot], differing: str = "") -> str:
    """The page of a run and its plots; ``differing`` is the table of a comparison's settings."""
    layout = transfer(run.results) if run.results else None
    title = str(run.card.get("name") or run.name)
    figures = {plot.name: _figure(plot) for plot in plots}
    sections = []
    if differing:
        sections.append(_section("What differs", differing))
    if layout:
        sections.append(_section("Transfer", _table(layout) + figures.pop("transfer")))
    sections += [_section(p.heading, figures[p.name]) for p in plots if p.name in figures]
    if run.sanity:
        sections.append(_section("Sanity checks", _checks(run.sanity)))
    details = "".join(_details(run))
    sections += [_section("Details", details)] if details else []
    css = css_variables() + (resources.files("advmeta.report") / "page.css").read_text("utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)} · advmeta</title>
<style>
{css}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
{_facts(run)}
</header>
<main>
{_numbers(layout) if layout else ""}
{"".join(sections)}</main>
</body>
</html>
"""


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{_text(heading)}</h2>\n{body}\n</section>\n"


def _facts(run: Run) -> str:
    """What made the run, as one line and the command."""
    seconds = run.card.get("seconds")
    facts = [
        f"seed {run.card['seed']}" if "seed" in run.card else "",
        _duration(seconds) if isinstance(seconds, (int, float)) else "",
        str(run.card.get("hardware") or ""),
    ]
    line = " · ".join(_text(fact) for fact in facts if fact)
    command = run.card.get("command") or ""
    command = " ".join(map(str, command)) if isinstance(command, list) else str(command)
    return (f'<p class="muted">{line}</p>\n' if line else "") + (
        f"<pre><code>{_text(command)}</code></pre>" if command else ""
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 or seconds != seconds else f"{seconds / 60:.1f} min"


def _numbers(layout: Transfer) -> str:
    """The robust accuracies to compare, where the meta-optimizer was meta-trained for."""
    columns = [column for column in layout.columns if column.setting == SAME]
    if not columns:
        return ""
    cells = {row: layout.cells[row, columns[0]] for row in layout.rows
             if (row, columns[0]) in layout.cells}  # fmt: skip
    kinds = {
        "meta-optimizer": [row for row in cells if row.meta],
        "best baseline without adversarial examples": [
            row for row in cells if not row.meta and row.inner_gradient in ("clean", "noisy")
        ],
        "best adversarial training": [
            row for row in cells if not row.meta and row.inner_gradient == "adversarial"
        ],
    }
    items = "".join(_number(kind, rows, cells) for kind, rows in kinds.items() if rows)
    return (
        f'<dl class="numbers">{items}</dl>\n<p class="muted">Robust accuracy, '
        f"{_text(', '.join(layout.header(columns[0])))}.</p>"
    )


def _number(kind: str, rows: Iterable[Row], cells: Mapping[Row, Cell]) -> str:
    # A comparison with NaN is false: it is shown only where there is nothing else.
    best = max(rows, key=lambda row: (cells[row].robust.mean >= 0, cells[row].robust.mean))
    return (
        f"<div{' class=meta' if best.meta else ''}><dt>{kind}</dt>"
        f"<dd>{cells[best].robust} <small>{_text(best.label)}</small></dd></div>"
    )


def _table(layout: Transfer) -> str:
    heads = []
    for column in layout.columns:
        first, *rest = layout.header(column) or ("all",)
        below = "".join(f"<span>{_text(line)}</span>" for line in rest)
        heads.append(f'<th scope="col">{_text(first)}{below}</th>')
    heads += [f'<th scope="col" class="cost">{name}</th>' for name in COSTS]
    lines = [
        f"<tr{' class=meta' if row.meta else ''}>"
        f'<th scope="row">{_text(row.label)}</th>'
        + "".join(_cell(layout.cells.get((row, column))) for column in layout.columns)
        + "".join(f"<td>{_text(cost)}</td>" for cost in layout.costs[row].strings())
        + "</tr>\n"
        for row in layout.rows
    ]
    return (
        '<div class="scroll" tabindex="0"><table class="transfer">\n<thead><tr>'
        f'<th scope="col">optimizer (inner gradient)</th>{"".join(heads)}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody></table></div>\n"
        f'<p class="muted">{_text(layout.caption)}</p>\n'
    )


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td>-</td>"
    beside = "".join(f"<span>{text}</span>" for text in cell.beside)
    return f"<td>{cell.robust}<span>({cell.clean.mean:.3f})</span>{beside}</td>"


def _checks(records: Sequence[Mapping]) -> str:
    """What the checks found; those that failed stand out."""
    heads = "".join(f'<th scope="col">{name}</th>' for name, _ in CHECK_COLUMNS)
    lines = [
        f"<tr{' class=meta' if record['passed'] is False else ''}>"
        + "".join(f"<td>{_text(text)}</td>" for text in check_cells(record))
        + "</tr>\n"
        for record in records
    ]
    return (
        '<p class="muted">Of the meta-optimizer\'s first model in the first column, on a part of '
        "the test set: is its robustness its own, or the attack's weakness? A check passes where "
        "the value is at most what is allowed.</p>\n"
        f'<div class="scroll" tabindex="0"><table class="checks">\n<thead><tr>{heads}</tr></thead>'
        f"\n<tbody>\n{''.join(lines)}</tbody></table></div>\n"
    )


def _figure(plot: Plot) -> str:
    panels = "".join(
        to_svg(panel).replace(
            "<svg",
            f'<svg role="img" aria-label="{_text(panel.alt)}" '
            f'style="max-width: {panel.width * PX:.0f}px"',
            1,
        )
        for panel in plot.panels
    )
    legend = "".join(
        f"<li{' class=meta' if look.meta else ''}>{_swatch(look, plot.markers)}{_text(label)}</li>"
        for label, look in plot.legend
    )
    legend = f'<ul class="legend">{legend}</ul>\n' if legend else ""
    caption = f"<figcaption>{_text(plot.caption)}</figcaption>"
    return f'<figure>\n{legend}<div class="panels">\n{panels}</div>\n{caption}\n</figure>'


def _swatch(look: Look, marker: bool) -> str:
    color = f"var(--{look.color})"
    if marker:
        return (
            '<svg width="12" height="12" viewBox="0 0 10 10" aria-hidden="true">'
            f'<path d="{SHAPES[look.marker]}" fill="{color}"/></svg>'
        )
    dash = " ".join(f"{length * look.width:g}" for length in look.dash or ())
    return (
        '<svg width="34" height="10" viewBox="0 0 34 10" aria-hidden="true"><path d="M0 5h34" '
        f'fill="none" stroke="{color}" stroke-width="{look.width * 1.2:g}" '
        f'stroke-dasharray="{dash or "none"}"/></svg>'
    )


def _details(run: Run) -> Iterator[str]:
    config = run.config or run.card.get("config") or {}
    card = {key: value for key, value in run.card.items() if key != "config"}
    if config:
        yield _fold("Configuration", ("setting", "value"), flat(config))
    if card:
        yield _fold("Weights and environment", ("entry", "value"), flat(card))
    tuned = [record for record in run.results if record.get("hyperparameters")]
    if tuned:
        header = ("optimizer (inner gradient)", "setting", "hyperparameters",
                  "gradient evaluations spent on tuning")  # fmt: skip
        yield _fold("Hyperparameters", header, dict.fromkeys(map(_choice, tuned)))


def _choice(record: Mapping) -> tuple[str, str, str, str]:
    spent = record.get("tuning_gradient_evaluations") or 0
    values = ", ".join(f"{name} {value}" for name, value in flat(record["hyperparameters"]))
    where = ", ".join(name for name in column_of(record)[:3] if name)
    return row_of(record).label, where, values, f"{spent:,}"


def _fold(summary: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return f"<details><summary>{summary}</summary>{plain_table(header, lines)}</details>\n"


def plain_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    heads = "".join(f'<th scope="col">{_text(name)}</th>' for name in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{_text(text)}</td>' for text in line)}</tr>\n" for line in lines
    )
    return (
        '<div class="scroll" tabindex="0"><table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )
