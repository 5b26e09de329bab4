"""The ladder of kernels: each rung a bar, idea by idea, and what each was worth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes

from tessera.bench.kernels.ladder import Step, climb
from tessera.bench.report.document import Cell, Figure, Panel, Table
from tessera.bench.report.drawing import PALETTE, log_axis
from tessera.bench.report.figures import named, short
from tessera.bench.report.metrics import digits
from tessera.bench.report.rows import Rows, Session, Style


def ladder(rows: Rows, session: Session) -> list[Figure]:
    """A figure of every case that a ladder climbed, a panel each; [] where none did."""
    climbed = {case: steps for case in session.cases if (steps := _steps(session, case))}
    if not climbed:
        return []
    panels = [_panel(rows, session, case, steps) for case, steps in climbed.items()]
    body: list[list[Cell | str]] = []
    for case, steps in climbed.items():
        for step in steps:
            times = [f"{digits(value)}x" if value else "-" for value in (step.before, step.ground)]
            body.append([_heading(session, case), named(rows, step.label), digits(step.ms), *times, step.idea])
    columns = ["case", "rung", "ms", "x the rung before", "x naive", "idea"]
    table = Table("The ladder: what each idea is worth", columns, body)
    text = "The ladder: our own kernels idea by idea, the first on top; how many times as fast as the one above."
    return [Figure("kernel-ladder", text, panels, [], table)]


def _steps(session: Session, case: str) -> list[Step]:
    """Of the last run of a case, where several are in one file."""
    of_case = [row for row in session.rows if row.case_key == case]
    return climb(list({row.subject.label: row for row in of_case}.values()))


def _heading(session: Session, case: str) -> str:
    return session.case_text(case) or str(session.case_of[case].get("phase", "kernels"))


def _panel(rows: Rows, session: Session, case: str, steps: Sequence[Step]) -> Panel:
    said = "; ".join(f"{step.label} {digits(step.ms)} ms" for step in steps)
    draw = partial(_draw, steps=steps, styles=rows.styles)
    heading = _heading(session, case)
    return Panel(heading, draw, f"Ladder, {heading}, in the order of the ideas: {said}.", 0.8 + 0.36 * len(steps))


def _draw(axes: Axes, steps: Sequence[Step], styles: dict[str, Style]) -> None:
    """Lengths are logarithmic: an idea that makes it twice as fast takes the same off every bar."""
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    least, most = min(step.ms for step in steps), max(step.ms for step in steps)
    axes.set_xlim(least / 2, most * 1.5 * (2 * most / least) ** 0.5)  # room for the words beside the longest
    log_axis(axes, "x")
    for index, step in enumerate(steps):
        color = PALETTE[styles[step.label].color]
        axes.barh(index, step.ms - least / 2, left=least / 2, height=0.62, color=color, alpha=0.85)
        worth = f" {digits(step.ms)} ms" + (f", {digits(step.before)}x" if step.before else "")
        axes.annotate(worth, (step.ms, index), fontsize=7.5, va="center")
    axes.set_yticks(range(len(steps)), [short(step.label) for step in steps])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ms")
