"""What `tessera bench offline` shows: a table of medians with the spread of paired ratios, and offline_results.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from tessera.bench.record import Record, Value
from tessera.bench.served.rows import newest

HEAD = ("subject", "output tok/s", "total tok/s", "req/s", "s", "latency p50/p99 ms", "peak MiB", "against the first")


def by_subject(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """Rows by label, in the order in which the labels first came."""
    found: dict[str, list[Record]] = {}
    for row in newest(rows):
        found.setdefault(row.subject.label, []).append(row)
    return found


def table(rows: Sequence[Record], labels: Sequence[str]) -> list[tuple[str, ...]]:
    """Cells, the head first; one line a subject that has figures, in the order of `labels`.

    Ratios are those to the first line, `against the first`.
    """
    subjects = by_subject(rows)
    measured = [label for label in labels if _ok(subjects.get(label, []))]
    first = _ok(subjects[measured[0]]) if measured else {}
    return [HEAD, *(_line(label, subjects[label], first) for label in measured)]


def reasons(rows: Sequence[Record]) -> list[str]:
    """A line for each subject and reason that there are no figures, or fewer."""
    lines = (f"{row.subject.label} {row.status}: {row.reason}" for row in newest(rows) if row.status != "ok")
    return list(dict.fromkeys(lines))


def _line(label: str, rows: Sequence[Record], first: dict[int, Record]) -> tuple[str, ...]:
    done = _ok(rows)
    speeds = _values(done, "output_tok_s")
    latency = "-"
    if "latency_ms_p50" in next(iter(done.values())).metrics:
        latency = " / ".join(f"{median(_values(done, f'latency_ms_p{part}')):.0f}" for part in (50, 99))
    peak = [row.metrics["peak_memory_bytes"] for row in done.values() if "peak_memory_bytes" in row.metrics]
    return (
        label + (f" ({len(rows) - len(done)} of {len(rows)} failed)" if len(done) < len(rows) else ""),
        f"{median(speeds):.1f} ({min(speeds):.1f}..{max(speeds):.1f})",
        f"{median(_values(done, 'total_tok_s')):.1f}",
        f"{median(_values(done, 'req_s')):.2f}",
        f"{median(_values(done, 'seconds')):.3f}",
        latency,
        f"{max(peak) / 2**20:.0f}" if peak else "-",
        _ratio(done, first),
    )


def _ratio(done: dict[int, Record], first: dict[int, Record]) -> str:
    """Of output tokens a second, repeat by repeat: median and extremes."""
    ratios = paired_ratios(done, first)
    return f"{median(ratios):.2f}x ({min(ratios):.2f}..{max(ratios):.2f})" if ratios else "-"


def paired_ratios(done: dict[int, Record], first: dict[int, Record]) -> list[float]:
    """output_tok_s over that of the first subject in the same repeat, for repeats that both have."""
    return [done[n].metrics["output_tok_s"] / first[n].metrics["output_tok_s"] for n in sorted(done) if n in first]


def of_case(rows: Sequence[Record], case: Mapping[str, Value]) -> list[Record]:
    """The rows of one workload."""
    return [row for row in rows if row.case == case]


def write_results(path: Path, rows: Sequence[Record], labels: Sequence[str]) -> None:
    """All of a run in one JSON file: machine, versions, and for each workload and subject medians, passes and times."""
    if not rows:
        return
    cases = list({row.case_key: row.case for row in rows}.values())
    results = {
        "provenance": asdict(rows[0].provenance),
        "cases": [{"case": case, "subjects": _entries(of_case(rows, case), labels)} for case in cases],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def _entries(rows: Sequence[Record], labels: Sequence[str]) -> list[dict[str, Any]]:
    subjects = by_subject(rows)
    first = next(filter(None, (_ok(subjects.get(label, [])) for label in labels)), {})
    return [_entry(label, subjects[label], first) for label in labels if label in subjects]


def _entry(label: str, rows: Sequence[Record], first: dict[int, Record]) -> dict[str, Any]:
    done = _ok(rows)
    row = next(iter(done.values()), rows[0])
    entry: dict[str, Any] = {
        "subject": label,
        "engine": row.subject.engine,
        "attention": row.subject.resolved,
        "note": row.subject.note,
        "status": row.status,
        "reasons": sorted({each.reason for each in rows if each.reason}),
        "settings": row.conditions.settings,
        "medians": {name: median(_values(done, name)) for name in row.metrics},
        "output_tok_s": _values(done, "output_tok_s"),
        "wall_seconds": {"warmup": row.metrics.get("warmup_seconds"), "passes": _values(done, "seconds")},
        "ratios_to_first": paired_ratios(done, first),
    }
    return entry


def _ok(rows: Sequence[Record]) -> dict[int, Record]:
    return {row.repeat: row for row in rows if row.status == "ok"}


def _values(rows: dict[int, Record], name: str) -> list[float]:
    return [row.metrics[name] for row in rows.values()]
