"""A report as one HTML file that asks nothing of any network, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tessera.bench.report.document import Block, Bullets, Cell, Code, Figure, Report, Table
from tessera.bench.report.drawing import inline_svg

_NUMBER = re.compile(r"^[-+]?[\d.,]+(e[-+]?\d+)?( ?(±.*|x|%|ms|[KMG]iB|to [\d.]+))?$|^-$|^$")
_SHAPES = {
    "o": "M5 1a4 4 0 1 0 .01 0z",
    "s": "M1.5 1.5h7v7h-7z",
    "^": "M5 1l4 8h-8z",
    "D": "M5 .5L9.5 5 5 9.5.5 5z",
    "v": "M5 9L1 1h8z",
    "P": "M3.5 1h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z",
    "X": "M1 3l2-2 2 2 2-2 2 2-2 2 2 2-2 2-2-2-2 2-2-2 2-2z",
    "<": "M1 5l8-4v8z",
    ">": "M9 5l-8-4v8z",
}
"""Markers of the figures, in a square of 10."""


def html(report: Report) -> str:
    """The page; every text in it is escaped, and it forbids itself scripts and anything from elsewhere."""
    environment = Environment(
        loader=PackageLoader("tessera.bench.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        is_a=_is_a,
        svg=lambda panel, name: Markup(inline_svg(panel, name)),
        shape=lambda style: _SHAPES[style.marker],
        aligned=_aligned,
        plain=plain,
        slug=_slug,
    )
    css = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(report=report, css=Markup(css))


def markdown(report: Report, files: dict[str, str] | None = None) -> str:
    """The same in Markdown, figures as tables; `files` names an image for each figure that has one."""
    lines = [f"# {_escape(report.title)}", "", _escape(report.subtitle), ""]
    lines += [
        f"{'**' if index == 0 else ''}{_escape(text)}{'**' if index == 0 else ''}\n"
        for index, text in enumerate(report.verdict)
    ]
    for section in report.sections:
        lines += [f"## {_escape(section.title)}", ""]
        for block in section.blocks:
            lines += [*_markdown(block, files or {}), ""]
    return "\n".join(lines).rstrip() + "\n"


def plain(cell: Cell | str) -> str:
    """A cell's text."""
    return cell if isinstance(cell, str) else cell.text


def _is_a(block: Block, kind: str) -> bool:
    return type(block).__name__.lower() == kind


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _aligned(table: Table) -> list[bool]:
    """Which columns hold numbers, and so are set to the right."""
    columns = range(len(table.columns))
    return [bool(table.rows) and all(_NUMBER.match(plain(row[index])) for row in table.rows) for index in columns]


def _markdown(block: Block, files: dict[str, str]) -> list[str]:
    if isinstance(block, Table):
        return _markdown_table(block)
    if isinstance(block, Figure):
        image = files.get(block.name)
        shown = [f"![{_escape(block.caption)}]({image})", ""] if image else []
        return [*shown, _escape(block.caption), "", *_markdown_table(block.table)]
    if isinstance(block, Code):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
        return [f"{fence}console", block.text, fence]
    if isinstance(block, Bullets):
        return [f"- {_escape(item)}" for item in block.items]
    return [_escape(block)]


def _markdown_table(table: Table) -> list[str]:
    marks = ["---:" if right else "---" for right in _aligned(table)]
    lines = [f"**{_escape(table.caption)}**", "", _line(table.columns), f"| {' | '.join(marks)} |"]
    lines += [_line([plain(cell) for cell in row]) for row in table.rows]
    return [*lines, *(["", _escape(table.note)] if table.note else [])]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escape, cells))} |"


def _escape(text: str) -> str:
    """On one line, with nothing that Markdown, or HTML in it, would take as its own."""
    return re.sub(r"([\\`*<>|\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
