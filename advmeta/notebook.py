"""How results show themselves in a notebook."""

import html
from collections.abc import Iterable, Sequence


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """A table, all text escaped; numbers with a fraction to three places; the note below it."""

    def line(tag: str, values: Sequence[object]) -> str:
        return f"<tr>{''.join(f'<{tag}>{_text(value)}</{tag}>' for value in values)}</tr>"

    body = "".join(line("td", row) for row in rows)
    below = f"<p>{_text(note)}</p>" if note else ""
    return f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>{below}"


def _text(value: object) -> str:
    return html.escape(f"{value:.3f}" if isinstance(value, float) else str(value))
