"""Figures of served requests: latency over load, throughput, time to the first token, the sweep of an API."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes

from tessera.bench.report.document import Cell, Figure, Panel, Table
from tessera.bench.report.drawing import PALETTE, PAPER, log_axis, look, plain_ticks, wide_range
from tessera.bench.report.metrics import digits, number, title
from tessera.bench.report.rows import Rows, Session, Style
from tessera.bench.statistics import median

Styles = dict[str, Style]
MIN_FOR_P99 = 100
"""Requests."""
LATENCIES = ("ttft", "tpot", "itl", "e2e")


_LOADS = {"scale": "scale of gaps between arrivals (smaller: more load)", "concurrency": "streams at a time"}
"""What a replay's load is over."""


def online(rows: Rows, session: Session) -> list[Figure]:
    """A 2x2 figure for each trace: the p90 curve, a band from p50 to p90, hollow marks at p99."""
    figures = []
    groups = [(axis, group, cases) for axis in _LOADS for group, cases in session.grouped(axis).items()]
    for axis, group, cases in groups:
        names = [name for name in LATENCIES if f"{name}_ms_p90" in session.metrics]
        panels = [_latency_panel(session, rows.styles, cases, name, axis) for name in names]
        if panels:
            about = f" ({group})" if group else ""
            tail = ", p99 hollow" if with_tail(session, cases) else f" (no p99 of fewer than {MIN_FOR_P99} requests)"
            text = f"Latency online{about}: p90 as a curve, p50 to p90 as a band{tail}; median of the repeats."
            table = _latency_table(rows, session, cases, names, about, axis)
            figures.append(Figure(_name("online-latency", group), text, panels, session.labels, table))
    return figures


def bars(rows: Rows, session: Session, metric: str, name: str, caption: str) -> list[Figure]:
    """A panel a case: the median as a bar, every repeat as a dot."""
    cases = [case for case in session.cases if _measured(session, case, metric)]
    if not cases:
        return []
    panels = []
    for case in cases:
        values = _measured(session, case, metric)
        height = 0.75 + 0.36 * len(values)
        draw = partial(_draw_bars, values=values, styles=rows.styles, label=title(metric))
        said = "; ".join(f"{label} {number(metric, median(found))}" for label, found in values.items())
        heading = session.case_text(case) or title(metric)
        panels.append(Panel(heading, draw, f"Bars of {title(metric)}, {heading}: {said}.", height))
    columns = ["case", "subject", "median", "lowest", "highest", "repeats"]
    body: list[list[Cell | str]] = [
        [session.case_text(case) or "all", named(rows, label), *_five(metric, found)]
        for case in cases
        for label, found in _measured(session, case, metric).items()
    ]
    return [Figure(name, caption, panels, session.labels, Table(f"{title(metric)}, each case", columns, body))]


def sweep(rows: Rows, session: Session) -> list[Figure]:
    """Throughput and time to the first token over concurrency."""
    figures = []
    for group, cases in session.grouped("concurrency").items():
        metrics = [
            name
            for name in ("generation_tok_s", "prompt_tok_s", "ttft_ms_min", "ttft_ms_max")
            if name in session.metrics
        ]
        panels = [_line_panel(session, rows.styles, cases, name, "concurrency") for name in metrics]
        about = f" ({group})" if group else ""
        columns = ["concurrency", "subject", *map(title, metrics)]
        body = _axis_rows(rows, session, cases, "concurrency", metrics)
        table = Table(f"Sweep over concurrency{about}, median of the repeats", columns, body)
        text = f"The API under rising concurrency{about}: median as a line, every repeat as a dot."
        figures.append(Figure(_name("api-sweep", group), text, panels, session.labels, table))
    return figures


def named(rows: Rows, label: str) -> Cell:
    """A cell with a subject and its colour."""
    return Cell(label, style=rows.styles.get(label))


def _name(base: str, group: str) -> str:
    extra = "".join(letter if letter.isalnum() else "-" for letter in group.lower()).strip("-")
    return f"{base}-{extra}"[:80].rstrip("-")


def _measured(session: Session, case: str, metric: str) -> dict[str, list[float]]:
    """Each subject's repeats, the best median first as the metric is throughput or latency."""
    found = {label: list(session.values(label, case, metric).values()) for label in session.labels}
    return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda item: median(item[1])))


def _five(metric: str, found: Sequence[float]) -> list[Cell | str]:
    return [*(number(metric, value) for value in (median(found), min(found), max(found))), str(len(found))]


def _draw_bars(axes: Axes, values: dict[str, list[float]], styles: Styles, label: str) -> None:
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    for index, (name, found) in enumerate(values.items()):
        style = styles[name]
        axes.barh(index, median(found), height=0.62, color=PALETTE[style.color], alpha=0.85)
        jitter = [index + 0.16 * (((number * 7) % 5) / 2 - 1) for number in range(len(found))]
        axes.plot(found, jitter, "o", markersize=3.6, color=PAPER, markeredgecolor="#1b1f24", markeredgewidth=0.8)
    axes.set_yticks(range(len(values)), [short(name) for name in values])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.locator_params(axis="x", nbins=5)


def short(label: str) -> str:
    """A label that leaves room for the figure beside it."""
    return label if len(label) <= 26 else f"{label[:12]}…{label[-13:]}"


def _points(
    session: Session, label: str, cases: Sequence[str], axis: str, metric: str
) -> list[tuple[float, list[float]]]:
    found = [(session.case_of[case][axis], list(session.values(label, case, metric).values())) for case in cases]
    return [(float(x), values) for x, values in found if values and isinstance(x, (int, float))]


def _latency_panel(session: Session, styles: Styles, cases: Sequence[str], name: str, axis: str) -> Panel:
    def draw(axes: Axes) -> None:
        everything: list[float] = []
        for label in session.labels:
            curves = {
                part: [(x, median(found)) for x, found in _points(session, label, chosen, axis, f"{name}_ms_{part}")]
                for part, chosen in (("p50", cases), ("p90", cases), ("p99", with_tail(session, cases)))
            }
            _draw_latency(axes, curves, styles[label])
            everything += [y for curve in curves.values() for _, y in curve]
        _finish(axes, everything, _LOADS[axis], "ms")
        plain_ticks(
            axes,
            sorted({x for label in session.labels for x, _ in _points(session, label, cases, axis, f"{name}_ms_p90")}),
        )

    said = _said(session, cases, axis, f"{name}_ms_p90")
    return Panel(f"{name.upper()} (ms)", draw, f"Curves of {name.upper()} p90 in ms over {axis}. {said}")


def with_tail(session: Session, cases: Sequence[str]) -> list[str]:
    """Cases with enough requests for a p99; below `MIN_FOR_P99` it would be about the slowest single one."""
    known: dict[str, int] = {}
    for row in session.rows:
        asked = row.case.get("num_requests")
        num = asked if isinstance(asked, int) else max(map(len, row.samples.values()), default=MIN_FOR_P99)
        known[row.case_key] = min(num, known.get(row.case_key, num))
    return [case for case in cases if known.get(case, 0) >= MIN_FOR_P99]


def _draw_latency(axes: Axes, curves: dict[str, list[tuple[float, float]]], style: Style) -> None:
    middle, high = dict(curves["p50"]), dict(curves["p90"])
    shared = [x for x in high if x in middle]
    low, top = [middle[x] for x in shared], [high[x] for x in shared]
    axes.fill_between(shared, low, top, color=PALETTE[style.color], alpha=0.13, linewidth=0)
    lines = look(style)
    axes.plot(list(high), list(high.values()), **lines)
    marks = [x for x, _ in curves["p99"]], [y for _, y in curves["p99"]]
    color = PALETTE[style.color]
    axes.plot(
        *marks, linestyle="none", marker=style.marker, markerfacecolor="none", markeredgecolor=color, markersize=6
    )


def _line_panel(session: Session, styles: Styles, cases: Sequence[str], metric: str, axis: str) -> Panel:
    def draw(axes: Axes) -> None:
        everything: list[float] = []
        ticks: set[float] = set()
        for label in session.labels:
            points = _points(session, label, cases, axis, metric)
            lines = look(styles[label])
            axes.plot([x for x, _ in points], [median(found) for _, found in points], **lines)
            dots = [(x, value) for x, found in points for value in found]
            axes.plot([x for x, _ in dots], [y for _, y in dots], ".", markersize=4, alpha=0.6, color=lines["color"])
            everything += [y for _, y in dots]
            ticks |= {x for x, _ in points}
        if wide_range(sorted(ticks)) or len(ticks) > 3:
            axes.set_xscale("log", base=2)
        plain_ticks(axes, sorted(ticks))
        _finish(axes, everything, axis, title(metric))

    return Panel(title(metric), draw, f"Curves of {title(metric)} over {axis}. {_said(session, cases, axis, metric)}")


def _finish(axes: Axes, values: Sequence[float], x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if wide_range(values):
        log_axis(axes, "y")
    else:
        axes.set_ylim(0, 1.08 * max(values, default=1.0) or 1.0)


def _said(session: Session, cases: Sequence[str], axis: str, metric: str) -> str:
    parts = []
    for label in session.labels:
        points = _points(session, label, cases, axis, metric)
        if points:
            first, last = (f"{digits(median(found))} at {x:g}" for x, found in (points[0], points[-1]))
            parts.append(f"{label}: {first}" + (f", {last}" if len(points) > 1 else ""))
    return "; ".join(parts) + "."


def _latency_table(
    rows: Rows, session: Session, cases: Sequence[str], names: Sequence[str], about: str, axis: str
) -> Table:
    metrics = [f"{name}_ms_{part}" for name in names for part in ("p50", "p90", "p99")]
    tails = bool(with_tail(session, cases))
    metrics = [name for name in metrics if name in session.metrics and (tails or not name.endswith("_p99"))]
    columns = [axis, "subject", *(title(name).removesuffix(" (ms)") for name in metrics)]
    body = _axis_rows(rows, session, cases, axis, metrics)
    return Table(f"Latency in ms{about}, median of the repeats", columns, body)


def _axis_rows(
    rows: Rows, session: Session, cases: Sequence[str], axis: str, metrics: Sequence[str]
) -> list[list[Cell | str]]:
    body: list[list[Cell | str]] = []
    for case in cases:
        for label in session.labels:
            found = [list(session.values(label, case, name).values()) for name in metrics]
            if any(found):
                cells = [number(name, median(each)) if each else "-" for name, each in zip(metrics, found)]
                body.append([f"{session.case_of[case][axis]}", named(rows, label), *cells])
    return body
