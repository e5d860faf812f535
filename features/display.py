"""How do tables of the store look in a notebook?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str) -> str:
    """Make an HTML table of plain cells; names in it are data and are escaped."""

    def line(tag: str, cells: Iterable[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<table><caption>{escape(caption)}</caption>\n{line('th', columns)}\n{body}\n</table>"
