"""Tables as aligned text for a terminal and as Markdown for a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest
from unicodedata import combining, east_asian_width

from guerdon.errors import DataError

__all__ = ["markdown_table", "plain_table"]

_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?%?")


def plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay cells out in columns of equal width; columns of numbers are flush right.

    Args:
        headers: one per column.
        rows: cells, as many in each row as there are headers; a cell may hold line breaks.

    Returns:
        The table without a final line break.

    Raises:
        DataError: a row has another number of cells.
    """
    cells = _cells(headers, rows)
    widths = [max(_width(line) for row in cells for line in row[k].split("\n")) for k in range(len(headers))]
    right = _numeric(cells, len(headers))
    lines = []
    for number, row in enumerate(cells):
        for pieces in zip_longest(*(cell.split("\n") for cell in row), fillvalue=""):
            padded = [_pad(p, w, r) for p, w, r in zip(pieces, widths, right, strict=True)]
            lines.append("  ".join(padded).rstrip())
        if number == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table; bars in cells are escaped, line breaks become ``<br>``.

    Raises:
        DataError: a row has another number of cells than there are headers.
    """
    cells = _cells(headers, rows)
    right = _numeric(cells, len(headers))
    lines = ["| " + " | ".join(c.replace("|", "\\|").replace("\n", "<br>") for c in row) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("---:" if r else "---" for r in right) + "|")
    return "\n".join(lines)


def _cells(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
    if not headers:
        raise DataError("a table needs at least one header")
    for number, row in enumerate(rows, 1):
        if len(row) != len(headers):
            raise DataError(f"row {number} of the table has {len(row)} cells for {len(headers)} headers")
    return [[str(c) for c in row] for row in (headers, *rows)]


def _numeric(cells: Sequence[Sequence[str]], columns: int) -> list[bool]:
    out = []
    for k in range(columns):
        filled = [row[k].strip() for row in cells[1:] if row[k].strip() not in ("", "-")]
        out.append(bool(filled) and all(_NUMBER.fullmatch(c) for c in filled))
    return out


def _width(text: str) -> int:
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int, right: bool) -> str:
    blanks = " " * (width - _width(text))
    return blanks + text if right else text + blanks
