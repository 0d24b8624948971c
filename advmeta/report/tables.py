"""The transfer table, for the terminal and for a README, and the sanity checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from advmeta.evaluation.sanity.checks import COLUMNS, Check
from advmeta.evaluation.sanity.checks import cells as check_cells
from advmeta.report.records import Cell, Transfer, transfer

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

COSTS = ("gradient evaluations", "adversarial examples", "seconds a run")


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Makes the transfer table for the terminal.

    A row is an optimizer and its inner gradient, the meta-optimizer's last; a column is a setting.
    A cell holds the mean of the robust accuracies over the seeds, their sample standard deviation
    (nothing for one seed), in brackets the mean clean accuracy, and where records hold PGD's
    accuracy beside another attack's, that and the gap. Records of different data
    sets, architectures, threat models, attacks or numbers of inner steps never share a cell.

    Args:
      records: dicts as in results.json, one a row and seed. They hold optimizer, inner_gradient,
        clean_accuracy and robust_accuracy, in [0, 1]; for the rest also setting, dataset,
        architecture, norm, epsilon, attack, inner_steps, gradient_evaluations,
        adversarial_examples, seconds, tuning_gradient_evaluations, pgd (its name) and
        pgd_accuracy.

    Returns:
      A `rich.table.Table`, to be printed on a `rich.console.Console`.

    Raises:
      ValueError: no records, or one without the four that every record must hold.

    Example:
      >>> record = dict(optimizer="adam", inner_gradient="clean", setting="wider", dataset="digits",
      ...               architecture="mlp-64", norm="linf", epsilon=0.1, attack="pgd-40x3")
      >>> records = [record | dict(seed=seed, clean_accuracy=0.95, robust_accuracy=robust)
      ...            for seed, robust in enumerate((0.48, 0.5, 0.52))]
      >>> advmeta.report.table(records).row_count
      1
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    layout = transfer(records)
    has_pgd = any(cell.pgd for cell in layout.cells.values())
    words = (layout.caption, _COST_CAPTION, _PGD_CAPTION if has_pgd else "")
    caption = Text(" ".join(filter(None, words)), style="dim")
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption=caption,
                 caption_justify="left")  # fmt: skip
    made.add_column("optimizer\n(inner\ngradient)", width=LABEL_WIDTH)
    for lines in _headers(layout):
        header = Text("\n".join(_SHORT.get(line, line) for line in lines))
        made.add_column(header, justify="right", width=CELL_WIDTH, overflow="fold")
    costs = zip(*(layout.costs[row].strings() for row in layout.rows), strict=True)
    for header, cells in zip(_SHORT_COSTS, costs, strict=True):
        width = max(map(len, (*header.split(), *cells)))
        made.add_column(header.replace(" ", "\n"), justify="right", width=width)
    for row in layout.rows:
        if row.meta:
            made.add_section()
        label = Text(f"{row.optimizer}\n({row.inner_gradient})")
        cells = [_stacked(layout.cells.get((row, column))) for column in layout.columns]
        style = "bold green" if row.meta else None
        made.add_row(label, *cells, *layout.costs[row].strings(), style=style)
    return made


# Six settings fit a terminal of 80 columns, each number on a line of its own.
LABEL_WIDTH, CELL_WIDTH = 14, 7
_SHORT = {"same architecture": "same arch.", "other activation": "other activ."}
_SHORT_COSTS = ("grad. evals", "adv. ex.", "sec. /run")
_COST_CAPTION = "Grad. evals: gradient evaluations; adv. ex.: adversarial examples made."
_PGD_CAPTION = "P: under PGD; Δ: the gap."


def _stacked(cell: Cell | None) -> Text:
    """Robust accuracy, spread, clean accuracy and PGD below each other, the first one plain."""
    from rich.text import Text

    if cell is None:
        return Text("-")
    first, *rest = str(cell).replace("± ", "±").split()
    rest += [text.replace("PGD", "P").replace("gap", "Δ") for text in cell.beside]
    return Text.assemble(first, *((f"\n{word}", "dim") for word in rest))


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """Makes the transfer table of `advmeta.report.table` as GitHub markdown.

    Args:
      records: as for `advmeta.report.table`.

    Returns:
      The table, the meta-optimizer's rows in bold, and the caption as a paragraph below it.

    Raises:
      ValueError: as `advmeta.report.table`.

    Example:
      >>> record = dict(optimizer="adam", inner_gradient="clean", setting="wider", seed=0,
      ...               clean_accuracy=0.95, robust_accuracy=0.5, gradient_evaluations=200,
      ...               adversarial_examples=0, seconds=1.5)
      >>> print(advmeta.report.markdown([record]).splitlines()[2])
      | adam | clean | 0.500 (0.950) | 200 | 0 | 1.50 |
    """
    layout = transfer(records)
    heads = [_escaped(lines) for lines in _headers(layout)]
    header = ["optimizer", "inner gradient", *map("<br>".join, heads), *COSTS]
    lines = [header, ["---", "---", *[":-:"] * len(heads), *["--:"] * len(COSTS)]]
    for row in layout.rows:
        cells = [_in_markdown(layout.cells.get((row, column))) for column in layout.columns]
        line = [*_escaped(row), *cells, *layout.costs[row].strings()]
        lines.append([f"**{text}**" for text in line] if row.meta else line)
    (caption,) = _escaped([layout.caption])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{caption}\n"


def checks(records: Sequence[Mapping[str, Any]]) -> Table:
    """Makes a table of sanity checks for the terminal; those that failed say what to do.

    Args:
      records: dicts as in sanity.json, of the fields of `advmeta.Check`.

    Returns:
      A `rich.table.Table`, to be printed on a `rich.console.Console`.

    Example:
      >>> check = advmeta.Check("randomized_model", 1, 0.3, 1e-4, False, "differs: draw more")
      >>> advmeta.report.checks([check._asdict()]).row_count
      1
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        made.add_column(name, justify="right" if name in ("#", "value", "allowed") else "left")
    for record in records:
        *cells, note = check_cells(Check(**record))
        style = {True: None, False: "bold red", None: "dim"}[record["passed"]]
        made.add_row(*map(Text, cells), Text("" if record["passed"] else note), style=style)
    return made


def _in_markdown(cell: Cell | None) -> str:
    return "-" if cell is None else "<br>".join([str(cell), *cell.beside])


def _headers(layout: Transfer) -> list[tuple[str, ...]]:
    return [layout.header(column) or ("all",) for column in layout.columns]


def _escaped(texts: Sequence[str]) -> list[str]:
    marks = {"|": "\\|", "<": "&lt;", "*": "\\*", "\n": " "}
    return [text.translate(str.maketrans(marks)) for text in texts]
