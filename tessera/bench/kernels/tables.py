"""Rows of kernels as tables: each case with its fastest first, each backend over all cases, and what failed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from tessera.bench.record import Record

HEADER = ("backend", "ms", "tok/s", "TFLOP/s", "", "of ceiling", "plan ms", "timed as", "proven kernel")
_GB_BELOW = 1.0
"""TB/s below which a table counts in GB/s."""


@dataclass(frozen=True)
class Table:
    """A title, rows of which the first is the header, and lines beneath; either may be empty."""

    title: str
    rows: list[tuple[str, ...]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def tables(records: Sequence[Record]) -> list[Table]:
    """What was measured of the machine, then case by case, then backend by backend, then what did not succeed."""
    kernels = [row for row in records if row.kind == "kernels"]
    cases = list(_by_case(kernels).values())
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


def kernel_name(symbol: str) -> str:
    """A kernel's name without namespaces, template and call arguments: what tells it from others at a glance."""
    plain = re.sub(r"^void ", "", symbol)
    if "::" in plain and re.search(r"device_kernel<", plain):  # CUTLASS: the kernel is the argument
        inner = re.findall(r"(\w*(?:Attn|Flash|Fwd|Kernel)\w*)<", plain.partition("device_kernel<")[2])
        plain = next(iter(inner), plain)
    plain = re.split(r"[<(]", plain)[0]
    name = plain if plain.startswith("aten::") else plain.rpartition("::")[2]
    return name if len(name) <= 48 else f"{name[:22]}..{name[-24:]}"


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
    """The fastest first, those without figures last."""
    case = rows[0].case
    of = {"page_size": "pages of {}", "window": "window {}", "soft_cap": "soft cap {}"}
    more = [text.format(case[name]) for name, text in of.items() if name in case]
    if case["mode"] != "engine":
        more.append(f"{case['mode']} only")
    timed = sorted((row for row in rows if row.status == "ok"), key=lambda row: row.metrics["ms_median"])
    bound = (
        f", bound by {timed[0].conditions.settings['bound']}"
        if timed and "bound" in timed[0].conditions.settings
        else ""
    )
    title = (
        ", ".join([f"{case['phase']} {case['workload']}", f"heads {case['heads']}", str(case["dtype"]), *more]) + bound
    )
    in_gb = bool(timed) and timed[0].metrics["tb_s"] < _GB_BELOW
    header = [*HEADER]
    header[4] = "GB/s" if in_gb else "TB/s"
    table: list[tuple[str, ...]] = [tuple(header), *(_figures(row, in_gb=in_gb) for row in timed)]
    table += [(row.subject.label, row.status, *[""] * 6, row.reason[:100]) for row in rows if row.status != "ok"]
    return Table(title, table)


def _figures(row: Record, *, in_gb: bool) -> tuple[str, ...]:
    metrics = row.metrics
    kernels = [kernel_name(proof.symbols[0].name) for proof in row.subject.proofs]
    return (
        row.subject.label,
        f"{_three(metrics['ms_median'])} ± {_three(metrics['ms_std'])}",
        f"{metrics['tok_s']:,.0f}",
        _three(metrics["tflop_s"]),
        _three(metrics["tb_s"] * (1000 if in_gb else 1)),
        f"{metrics['ceiling_share']:.1%}" if "ceiling_share" in metrics else "-",
        _three(metrics["plan_ms"]),
        _timed_as(row),
        ", ".join(dict.fromkeys(kernels)),
    )


def _timed_as(row: Record) -> str:
    """`graph (eager 0.051 ms)`; of a step of two phases, each one's time."""
    way = str(row.conditions.settings["timed_as"])
    medians = {
        name.removesuffix("_ms_median"): value for name, value in row.metrics.items() if name.endswith("_ms_median")
    }
    if len(row.subject.proofs) > 1:
        parts = [f"{name.replace('_', ' ')} {_three(value)}" for name, value in medians.items()]
        return ", ".join(parts)
    eager = next((value for name, value in medians.items() if name.endswith("_eager")), None)
    return way if eager is None or way == "eager" else f"{way} (eager {_three(eager)})"


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
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            about = f"{row.case['phase']} {row.case['workload']} {row.case['heads']} {row.case['dtype']}"
            reasons.setdefault((row.status, row.subject.label, row.reason), []).append(about)
    lines = [
        f"{status} in {cases[0] if len(cases) == 1 else f'{len(cases)} cases'}: {label}: {reason}"
        for (status, label, reason), cases in reasons.items()
    ]
    return Table(f"{sum(row.status == 'ok' for row in rows)}/{len(rows)} runs succeeded", lines=lines)


def _by_case(rows: Iterable[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for row in rows:
        found.setdefault(row.case_key, []).append(row)
    return found


def _bandwidth(tb_s: float) -> str:
    return f"{tb_s:.2f} TB/s" if tb_s >= _GB_BELOW else f"{1000 * tb_s:.1f} GB/s"


def _three(value: float) -> str:
    """Three digits that count, without an exponent."""
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.{max(0, min(6, 2 - math.floor(math.log10(value))))}f}"
