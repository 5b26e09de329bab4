"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence


def render(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """Rows in columns as wide as their widest cell; the last column runs on."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    return "\n".join(indent + line for line in lines)
