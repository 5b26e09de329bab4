"""Figures of kernels: the roofline, the share of the measured ceiling, a table shaded by how far each is behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from tessera.bench.report.document import Cell, Figure, Panel, Table
from tessera.bench.report.drawing import MUTED, PALETTE, log_axis
from tessera.bench.report.figures import named, short
from tessera.bench.report.ladder import ladder
from tessera.bench.report.metrics import digits
from tessera.bench.report.rows import Rows, Session, Style
from tessera.bench.statistics import geometric_mean, median

Point = tuple[str, float, float]
"""A subject, FLOP a byte, TFLOP/s."""
_Range = tuple[float, float]
_Words = dict[str, Any]
"""Of matplotlib's keywords."""


def kernels(rows: Rows, session: Session) -> list[Figure | Table]:
    """The ladder where one was climbed, roofline, share of ceiling, and a table for each phase."""
    found: list[Figure | Table] = []
    phases = _phases(session)
    if roofs := [panel for phase, cases in phases.items() if (panel := _roof_panel(rows, session, phase, cases))]:
        columns = ["phase", "subject", "case", "FLOP/byte", "TFLOP/s"]
        table = Table("Points of the roofline", columns, _roof_rows(rows, session, phases))
        text = "Roofline: each point is a case; the lines are what this machine was measured to reach."
        found.append(Figure("kernel-roofline", text, roofs, session.labels, table))
    shares = [panel for phase, cases in phases.items() if (panel := _share_panel(rows, session, phase, cases))]
    if shares:
        text = "Share of the measured ceiling that each kernel reaches: a dot a case, a bar at the median."
        found.append(Figure("kernel-ceiling-share", text, shares, [], _share_table(rows, session, phases)))
    return [*ladder(rows, session), *found, *(_heat_table(session, phase, cases) for phase, cases in phases.items())]


def _phases(session: Session) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for case in session.cases:
        found.setdefault(str(session.case_of[case].get("phase", "kernels")), []).append(case)
    return found


def _value(session: Session, label: str, case: str, metric: str) -> float | None:
    values = session.values(label, case, metric)
    return median(list(values.values())) if values else None


def _roof_points(session: Session, cases: Sequence[str]) -> list[Point]:
    found = []
    for label in session.labels:
        for case in cases:
            flops, moved = (_value(session, label, case, name) for name in ("tflop_s", "tb_s"))
            if flops and moved:
                found.append((label, flops / moved, flops))
    return found


def _ceilings(rows: Rows, session: Session, cases: Sequence[str]) -> tuple[dict[str, float], float | None]:
    """TFLOP/s by dtype and TB/s, of ceilings measured on this machine; only for dtypes that the cases have.

    On a CPU float32 too, which is the ceiling of types that the processor cannot multiply.
    """
    dtypes = {str(session.case_of[case].get("dtype", "")) for case in cases}
    dtypes |= {"float32"} if session.device == "cpu" else set()
    flops: dict[str, float] = {}
    moved: list[float] = []
    for other in rows.of("ceiling"):
        if (other.machine, other.device) == (session.machine, session.device):
            for row in other.rows:
                dtype = str(row.case.get("dtype", ""))
                if row.case.get("ceiling") != "gemm":
                    moved.append(row.metrics["tb_s"])
                elif dtype in dtypes:
                    flops[dtype] = max(flops.get(dtype, 0.0), row.metrics["tflop_s"])
    return flops, max(moved, default=None)


def _roof_panel(rows: Rows, session: Session, phase: str, cases: Sequence[str]) -> Panel | None:
    points = _roof_points(session, cases)
    if not points:
        return None
    flops, moved = _ceilings(rows, session, cases)
    draw = partial(_draw_roof, points=points, styles=rows.styles, flops=flops, moved=moved)
    top = max(points, key=lambda point: point[2])
    limits = [f"{digits(value)} TFLOP/s in {dtype}" for dtype, value in flops.items()]
    limits += [f"{digits(moved)} TB/s"] if moved else []
    ceilings = f" Ceilings: {', '.join(limits)}." if limits else " No ceiling was measured."
    alt = f"Roofline of {phase} kernels. The highest point is {top[0]} with {digits(top[2])} TFLOP/s.{ceilings}"
    return Panel(phase, draw, alt, 3.3)


def _draw_roof(
    axes: Axes, points: Sequence[Point], styles: dict[str, Style], flops: dict[str, float], moved: float | None
) -> None:
    (left, right), (bottom, top) = _roof_ranges(points, flops, moved)
    for dtype, roof in flops.items():
        start = max(left, roof / moved) if moved else left
        axes.plot([start, right], [roof, roof], color=MUTED, linewidth=1.2, linestyle="--")
        near = any(roof < other < 1.5 * roof for other in flops.values())
        place: _Words = {"ha": "right", "va": "top" if near else "bottom"}
        axes.annotate(f"{dtype}, {digits(roof)}", (right, roof), fontsize=7.5, color=MUTED, **place)
    if moved:
        knee = min(right, max(flops.values(), default=top) / moved)
        begin = max(left, bottom / moved)
        axes.plot([begin, knee], [begin * moved, knee * moved], color=MUTED, linewidth=1.2)
        middle = math.sqrt(begin * knee)  # nothing lies above the line, so there is room
        words: _Words = {"textcoords": "offset points", "ha": "right", "va": "bottom"}
        axes.annotate(f"{digits(moved)} TB/s", (middle, middle * moved), (-3, 2), fontsize=7.5, color=MUTED, **words)
    for label, style in styles.items():
        mine = [(x, y) for name, x, y in points if name == label]
        if mine:
            color, xs, ys = PALETTE[style.color], [x for x, _ in mine], [y for _, y in mine]
            axes.plot(xs, ys, linestyle="none", marker=style.marker, color=color, markersize=5.5, alpha=0.85)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    log_axis(axes, "x")
    log_axis(axes, "y")
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("arithmetic intensity (FLOP/byte)")
    axes.set_ylabel("TFLOP/s")


def _roof_ranges(points: Sequence[Point], flops: dict[str, float], moved: float | None) -> tuple[_Range, _Range]:
    """Of both axes: every point, every roof and every knee with some room around, be it a single point."""
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    knees = [roof / moved for roof in flops.values()] if moved else []
    under = [] if moved is None else [moved * min(xs)]  # of the leftmost point, so that its roof is seen
    heights = [*ys, *flops.values(), *([] if flops else under)]
    return (min([*xs, *knees]) / 3, max([*xs, *knees]) * 3), (min(ys) / 2, max(heights) * 2)


def _roof_rows(rows: Rows, session: Session, phases: dict[str, list[str]]) -> list[list[Cell | str]]:
    body: list[list[Cell | str]] = []
    for phase, cases in phases.items():
        for case in cases:
            for label, x, y in _roof_points(session, [case]):
                body.append([phase, named(rows, label), session.case_text(case, ["phase"]), digits(x), digits(y)])
    return body


def _share_values(session: Session, cases: Sequence[str]) -> dict[str, list[float]]:
    found = {
        label: [value for case in cases if (value := _value(session, label, case, "ceiling_share")) is not None]
        for label in session.labels
    }
    return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda item: median(item[1])))


def _share_panel(rows: Rows, session: Session, phase: str, cases: Sequence[str]) -> Panel | None:
    values = _share_values(session, cases)
    if not values:
        return None
    said = "; ".join(f"{label} {median(found):.0%}" for label, found in values.items())
    draw = partial(_draw_shares, values=values, styles=rows.styles)
    return Panel(phase, draw, f"Share of ceiling of {phase} kernels, medians: {said}.", 0.8 + 0.3 * len(values))


def _draw_shares(axes: Axes, values: dict[str, list[float]], styles: dict[str, Style]) -> None:
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    for index, (label, found) in enumerate(values.items()):
        style = styles[label]
        color, at = PALETTE[style.color], [100 * value for value in found]
        axes.plot(at, [index] * len(at), linestyle="none", marker=style.marker, color=color, alpha=0.65)
        axes.plot([median(at)] * 2, [index - 0.3, index + 0.3], color=color, linewidth=2)
    axes.set_yticks(range(len(values)), [short(label) for label in values])
    axes.set_ylim(-0.6, len(values) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 106 * max(max(found) for found in values.values()))
    axes.set_xlabel("% of the measured ceiling")


def _share_table(rows: Rows, session: Session, phases: dict[str, list[str]]) -> Table:
    body: list[list[Cell | str]] = [
        [phase, named(rows, label), f"{median(found):.1%}", f"{min(found):.1%}", f"{max(found):.1%}", str(len(found))]
        for phase, cases in phases.items()
        for label, found in reversed(_share_values(session, cases).items())
    ]
    return Table("Share of the measured ceiling", ["phase", "subject", "median", "lowest", "highest", "cases"], body)


def _heat_table(session: Session, phase: str, cases: Sequence[str]) -> Table:
    """Cases down, subjects across, the fastest on average first; shaded by how far each is behind the best."""
    medians = {
        (case, label): value
        for case in cases
        for label in session.labels
        if (value := _value(session, label, case, "ms_median"))
    }
    fastest = {case: min((v for (c, _), v in medians.items() if c == case), default=0.0) for case in cases}
    behind = {
        label: geometric_mean(found)
        for label in session.labels
        if (found := [value / fastest[case] for (case, name), value in medians.items() if name == label])
    }
    order = sorted(behind, key=behind.__getitem__)
    body: list[list[Cell | str]] = []
    for case in cases:
        cells = [_heat_cell(session, case, label, medians.get((case, label)), fastest[case]) for label in order]
        body.append([session.case_text(case, ["phase"]) or phase, *cells])
    if order:
        mean: list[Cell | str] = [Cell(f"{behind[label]:.2f}x") for label in order]
        body.append(["behind the fastest, geometric mean", *mean])
    caption = f"{phase}: ms, median ± standard deviation; darker is further behind the fastest of the row"
    missing = len(medians) < len(cases) * len(order)
    note = "- was not measured: see the rows without figures." if missing else ""
    return Table(caption, ["case", *order], body, note)


def _heat_cell(session: Session, case: str, label: str, value: float | None, best: float) -> Cell:
    if value is None:
        return Cell("-", tone="muted")
    spread = _value(session, label, case, "ms_std")
    text = digits(value) + (f" ± {digits(float(f'{spread:.1g}'))}" if spread else "")
    heat = min(1.0, (value / best - 1) / 3)
    return Cell(text, heat=heat, tone="good" if value == best else "")
