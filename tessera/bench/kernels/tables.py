"""Rows of kernels as tables: each case with its fastest first, each backend over all cases, and what failed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec

from tessera.bench.kernels.words import Table, by_case, case_title, kernel_name, three
from tessera.bench.reasons import gathered
from tessera.bench.record import Record

HEADER = ("backend", "ms", "tok/s", "TFLOP/s", "", "of ceiling", "plan ms", "timed as", "proven kernel")
_GB_BELOW = 1.0
"""TB/s below which a table counts in GB/s."""


def tables(records: Sequence[Record]) -> list[Table]:
    """What was measured of the machine, then case by case, then backend by backend, then what did not succeed."""
    kernels = [row for row in records if row.kind == "kernels"]
    cases = list(by_case(kernels).values())
    machine = [_machine(records)] if any(row.kind == "ceiling" for row in records) else []
    return [*machine, *(_case(rows) for rows in cases), *_summary(cases), _outcome(kernels)]


def as_json(row: Record) -> str:
    """The essentials of a row, on one line."""
    fields = {
        "kind": row.kind,
        "case": row.case,
        "backend": row.subject.label,
        "status": row.status,
        "reason": row.reason,
        "metrics": row.metrics,
        "ms": row.samples.get("ms", []),
        "settings": row.conditions.settings,
        "kernels": [use.name for proof in row.subject.proofs for use in proof.symbols],
    }
    return msgspec.json.encode(fields).decode()


def _machine(records: Iterable[Record]) -> Table:
    """In the units of the tables."""
    measured, name = [], ""
    for row in (row for row in records if row.kind == "ceiling"):
        name = row.provenance.machine.name
        if row.status != "ok":
            measured.append(f"no {row.case['ceiling']} in {row.case['dtype']} ({row.reason:.100})")
        elif "tb_s" in row.metrics:
            measured.append(f"{row.case['ceiling']} {_bandwidth(row.metrics['tb_s'])}")
        else:
            measured.append(f"product of matrices in {row.case['dtype']} {row.metrics['tflop_s']:.3g} TFLOP/s")
    return Table(f"{name}, measured: {', '.join(measured)}")


def _case(rows: Sequence[Record]) -> Table:
    """The fastest first; those without figures beneath."""
    timed = sorted((row for row in rows if row.status == "ok"), key=lambda row: row.metrics["ms_median"])
    bound = (
        f", bound by {timed[0].conditions.settings['bound']}"
        if timed and "bound" in timed[0].conditions.settings
        else ""
    )
    title = case_title(rows[0].case) + bound
    in_gb = bool(timed) and timed[0].metrics["tb_s"] < _GB_BELOW
    header = [*HEADER]
    header[4] = "GB/s" if in_gb else "TB/s"
    table = [header, *([*_figures(row, in_gb=in_gb)] for row in timed)]
    if any("device_ms_median" in row.metrics for row in timed):
        on_device = [three(row.metrics["device_ms_median"]) for row in timed]
        table = [[*line[:2], extra, *line[2:]] for line, extra in zip(table, ("device ms", *on_device))]
    lines = [each.line for each in gathered(rows) if each.status == "failed"]
    if unavailable := [row.subject.label for row in rows if row.status == "unavailable"]:
        lines.append(f"unavailable, reasons at the end: {', '.join(unavailable)}")
    return Table(title, [tuple(line) for line in table] if timed else [], lines)


def _figures(row: Record, *, in_gb: bool) -> tuple[str, ...]:
    metrics = row.metrics
    kernels = [kernel_name(proof.symbols[0].name) for proof in row.subject.proofs]
    return (
        row.subject.label,
        f"{three(metrics['ms_median'])} ± {three(metrics['ms_std'])}",
        f"{metrics['tok_s']:,.0f}",
        three(metrics["tflop_s"]),
        three(metrics["tb_s"] * (1000 if in_gb else 1)),
        f"{metrics['ceiling_share']:.1%}" if "ceiling_share" in metrics else "-",
        three(metrics["plan_ms"]),
        _timed_as(row),
        ", ".join(dict.fromkeys(kernels)),
    )


def _timed_as(row: Record) -> str:
    """`graph (eager 0.051 ms)`; of a step of two phases, each one's time."""
    way = str(row.conditions.settings["timed_as"])
    medians = {
        name.removesuffix("_ms_median"): value
        for name, value in row.metrics.items()
        if name.endswith("_ms_median") and name != "device_ms_median"
    }
    if len(row.subject.proofs) > 1:
        parts = [f"{name.replace('_', ' ')} {three(value)}" for name, value in medians.items()]
        return ", ".join(parts)
    eager = next((value for name, value in medians.items() if name.endswith("_eager")), None)
    return way if eager is None or way == "eager" else f"{way} (eager {three(eager)})"


def _summary(cases: Sequence[Sequence[Record]]) -> list[Table]:
    """Of each backend: cases won, the geometric mean of its times over the fastest's, cases that succeeded."""
    ratios: dict[str, list[float]] = {}
    won: dict[str, int] = {}
    tried: dict[str, int] = {}
    for rows in cases:
        timed = {row.subject.label: row.metrics["ms_median"] for row in rows if row.status == "ok"}
        for row in rows:
            tried[row.subject.label] = tried.get(row.subject.label, 0) + 1
        for label, milliseconds in timed.items():
            ratios.setdefault(label, []).append(milliseconds / min(timed.values()))
        if timed:
            fastest = min(timed, key=timed.__getitem__)
            won[fastest] = won.get(fastest, 0) + 1
    if not tried:
        return []
    means = {label: math.exp(sum(map(math.log, ratios[label])) / len(ratios[label])) for label in ratios}
    table: list[tuple[str, ...]] = [("backend", "fastest in", "times the fastest, geometric mean", "succeeded in")]
    for label in sorted(tried, key=lambda name: (-won.get(name, 0), means.get(name, math.inf))):
        mean = f"{means[label]:.2f}" if label in means else "-"
        table.append((label, str(won.get(label, 0)), mean, f"{len(ratios.get(label, []))} of {tried[label]}"))
    return [Table(f"all {len(cases)} cases", table)]


def _outcome(rows: Sequence[Record]) -> Table:
    """How many succeeded, and each reason of the others once."""
    lines = [f"{_where(each.rows)}: {each.line}" for each in gathered(rows)]
    return Table(f"{sum(row.status == 'ok' for row in rows)}/{len(rows)} runs succeeded", lines=lines)


def _where(rows: Sequence[Record]) -> str:
    """`in 3 cases`, or which one."""
    cases = {row.case_key: row.case for row in rows}
    if len(cases) > 1:
        return f"in {len(cases)} cases"
    return "in " + " ".join(str(rows[0].case[name]) for name in ("phase", "workload", "heads", "dtype"))


def _bandwidth(tb_s: float) -> str:
    return f"{tb_s:.2f} TB/s" if tb_s >= _GB_BELOW else f"{1000 * tb_s:.1f} GB/s"
