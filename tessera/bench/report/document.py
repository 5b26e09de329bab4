"""What a report is made of, before it is a page or Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tessera.bench.report.rows import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Tone = Literal["", "good", "bad", "muted"]


@dataclass(frozen=True)
class Cell:
    """Of a table."""

    text: str
    heat: float | None = None
    """0 to 1: how strongly it is shaded; None for not at all."""
    tone: Tone = ""
    style: Style | None = None
    """The subject that the text names, to show its colour."""


@dataclass(frozen=True)
class Table:
    """Rows under a caption; `str` is a plain cell."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    draw: Callable[[Axes], None] = field(compare=False)
    alt: str = ""
    """What a reader who does not see it must know."""
    height: float = 3.0
    """Inches, at a width of 4.6."""


@dataclass(frozen=True)
class Figure:
    """Panels that belong together, and the same figures as a table."""

    name: str
    """Of its files: `online-latency`."""
    caption: str
    panels: Sequence[Panel]
    legend: Sequence[str]
    """Subjects drawn."""
    table: Table


@dataclass(frozen=True)
class Code:
    """Text to be typed or kept as it is."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


Block = Table | Figure | Code | Bullets | str
"""A `str` is a paragraph."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """All of it, in order; the verdict stands before every figure."""

    title: str
    subtitle: str
    verdict: Sequence[str]
    sections: Sequence[Section]
    styles: dict[str, Style]

    @property
    def figures(self) -> list[Figure]:
        """Every figure."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]
