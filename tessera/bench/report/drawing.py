"""Panels to SVG: inline ones that take the page's colours and font, and files that stand alone."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tessera.bench.report.document import Figure, Panel
from tessera.bench.report.rows import Style

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666a70", "#8c7a00")
"""Okabe and Ito's colours, which colour-blind readers tell apart; black and yellow replaced."""
INK, MUTED, GRID, PAPER = "#1b1f24", "#5b6471", "#e3e6eb", "#fdfefe"
_VARIABLES = {color: f"c{index}" for index, color in enumerate(PALETTE)}
_VARIABLES |= {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"}
_SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,  # a label is no formula, whatever its characters
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.formatter.use_mathtext": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
}
WIDTH = 4.6


def inline_svg(panel: Panel, name: str) -> str:
    """A panel as an <svg> element whose colours are CSS variables; the same bytes for the same panel and name."""
    with _settings(fonttype="none", salt=name):
        canvas = Canvas(figsize=(WIDTH, panel.height), layout="constrained")
        panel.draw(canvas.add_subplot())
        text = _svg(canvas)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 aria-hidden="true" focusable="false"', text, count=1)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))  # other ids are the same in every figure
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text


def write_files(figure: Figure, folder: Path, styles: dict[str, Style]) -> list[Path]:
    """NAME.svg and NAME.png with all panels and a legend, on white; returns their paths."""
    paths = [folder / f"{figure.name}.svg", folder / f"{figure.name}.png"]
    with _settings(fonttype="path", salt=figure.name):
        columns = min(2, len(figure.panels))
        rows = math.ceil(len(figure.panels) / columns)
        height = max(panel.height for panel in figure.panels)
        canvas = Canvas(figsize=(WIDTH * columns, height * rows + 0.5), layout="constrained", facecolor="white")
        for index, panel in enumerate(figure.panels):
            axes = canvas.add_subplot(rows, columns, index + 1)
            axes.set_title(panel.title)
            panel.draw(axes)
        if figure.legend:
            _legend(canvas, figure.legend, styles)
        canvas.savefig(paths[0], format="svg", metadata={"Date": None, "Creator": None})
        canvas.savefig(paths[1], format="png", dpi=150, metadata={"Software": None})
    return paths


def look(style: Style) -> dict[str, Any]:
    """Of a line."""
    return {"color": PALETTE[style.color], "marker": style.marker, "linestyle": style.dash}


def wide_range(values: Sequence[float]) -> bool:
    """Whether an axis should be logarithmic."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 30


def log_axis(axes: Axes, which: str) -> None:
    """Make `x` or `y` logarithmic, with ticks at 1, 2, 5 written as numbers (a power would need a formula)."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    steps = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    """The x axis says the values that were measured, and no others; thinned out where they would overlap."""
    shown = list(values) if len(values) <= 8 else list(values)[:: math.ceil(len(values) / 8)]
    axes.set_xticks(shown, [f"{value:g}" for value in shown])
    axes.minorticks_off()


@contextmanager
def _settings(fonttype: str, salt: str) -> Iterator[None]:
    extra: dict[Any, Any] = {"svg.fonttype": fonttype, "svg.hashsalt": salt, "svg.id": None}
    with matplotlib.rc_context({**_SETTINGS, **extra}):
        yield


def _svg(canvas: Canvas) -> str:
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return buffer.getvalue()


def _legend(canvas: Canvas, labels: Sequence[str], styles: dict[str, Style]) -> None:
    # a leading underscore would hide the entry
    handles = [Line2D([], [], label=f"\u200b{label}", **look(styles[label])) for label in labels]
    canvas.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8.5)
