"""The rows of an online benchmark as a table and as `online_results.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tessera.bench.record import Record
from tessera.bench.served.latency import PERCENTILES
from tessera.bench.served.rows import newest
from tessera.bench.statistics import median

LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
RATES = ("req_s", "output_tok_s", "total_tok_s", "goodput_share", "goodput_req_s")
CLIENT = (
    "client_processes",
    "client_cpu",
    "client_cpu_total",
    "client_lag_ms",
    "client_lag_ms_p50",
    "client_wake_ms_p50",
)
OTHERS = (*CLIENT, "cached_prompt_share", "peak_memory_bytes", "gpu_memory_bytes", "seconds")


def write_results(path: Path, rows: Sequence[Record], seconds: float) -> None:
    """One file for a whole run: versions, machine, wall time, and each backend's figures at each scale.

    A figure is the median over the repeats that did not fail; `repeats` and `failed` tell how many there were.
    """
    where = rows[0].provenance
    document: dict[str, Any] = {
        "command": where.command,
        "commit": where.commit,
        "versions": where.versions,
        "machine": where.machine,
        "started": where.started,
        "wall_seconds": round(seconds, 1),
        "statistic": "median over repeats; percentiles by linear interpolation",
        "results": [_entry(group) for group in _groups(rows)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


def table(rows: Sequence[Record]) -> list[tuple[str, ...]]:
    """Cells, a row a backend and scale or number of streams, these together; times in ms at p50/p90/p99."""
    first = "streams" if any("concurrency" in row.case for row in rows) else "scale"
    head = (first, "backend", "req/s", "out tok/s", "goodput", *(f"{name[:-3].upper()} ms" for name in LATENCIES), "")
    return [head, *(_cells(_entry(group)) for group in _groups(rows))]


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    first = (f"{entry.get('concurrency') or entry['scale']:g}", str(entry["backend"]))
    if "req_s" not in entry:
        return (*first, *[""] * (3 + len(LATENCIES)), f"{entry['status']}: {entry['reason']}")
    times = ("/".join(f"{value:.1f}" for value in entry.get(name, {}).values()) for name in LATENCIES)
    failed = f"{entry['failed']} of {entry['repeats']} repeats failed: {entry['reason']}" if entry["failed"] else ""
    notes = "; ".join(part for part in (failed, entry["note"]) if part)
    rates = (f"{entry['req_s']:.2f}", f"{entry['output_tok_s']:.1f}", f"{entry['goodput_share']:.0%}")
    return (*first, *rates, *times, notes)


def _groups(rows: Sequence[Record]) -> list[list[Record]]:
    """The repeats of each case and subject, by scale or number of streams."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in sorted(newest(rows), key=lambda row: (_load(row), row.repeat)):
        groups.setdefault((row.case_key, row.subject.label), []).append(row)
    return list(groups.values())


def _load(row: Record) -> float:
    return float(row.case.get("concurrency") or row.case.get("scale") or 0)


def _entry(group: Sequence[Record]) -> dict[str, Any]:
    good = [row for row in group if row.status == "ok"]
    shown = good[0] if good else group[0]
    entry: dict[str, Any] = {"backend": shown.subject.label} | shown.case
    entry |= {"status": shown.status, "repeats": len(group), "failed": len(group) - len(good)}
    entry |= {
        "reason": next((row.reason for row in group if row.reason), ""),
        "note": next((row.subject.note for row in group if row.subject.note), ""),
        "served_by": shown.subject.resolved,
    }
    for name in LATENCIES:
        points = {f"p{percent}": _median(good, f"{name}_p{percent}") for percent in PERCENTILES}
        if known := {point: value for point, value in points.items() if value is not None}:
            entry[name] = known
    single = {name: _median(good, name) for name in (*RATES, *OTHERS)}
    return entry | {name: value for name, value in single.items() if value is not None}


def _median(rows: Sequence[Record], name: str) -> float | None:
    values = [row.metrics[name] for row in rows if name in row.metrics]
    return median(values) if values else None
