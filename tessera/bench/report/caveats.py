"""What a sceptic would ask about these rows, found in the rows themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from tessera.bench.report.metrics import HEADLINES
from tessera.bench.report.rows import Rows, Session
from tessera.bench.statistics import MIN_REPEATS

MAX_DRIFT = 0.05


def caveats(rows: Rows) -> list[str]:
    """Sentences, the gravest first; [] where there is nothing to say."""
    return [
        *_interpreted(rows),
        *_places(rows),
        *_code(rows),
        *_client(rows),
        *_resumed(rows),
        *_repeats(rows),
        *_drift(rows),
        *_caches(rows),
        *_subjects(rows),
    ]


def _interpreted(rows: Rows) -> Iterator[str]:
    proofs = [(row.subject.label, proof) for row in rows.records for proof in row.subject.proofs]
    labels = {label for label, proof in proofs if any("triton_interpreted" in use.name for use in proof.symbols)}
    if labels:
        yield f"{', '.join(sorted(labels))} ran in Triton's interpreter: those times say nothing of a GPU."


def _places(rows: Rows) -> Iterator[str]:
    machines = {session.machine.name for session in rows.sessions}
    if len(machines) > 1:
        names = "; ".join(sorted(machines))
        yield f"Rows of {len(machines)} machines ({names}) lie side by side: only rows of one machine are compared."
    for kind in dict.fromkeys(session.kind for session in rows.sessions):
        if kind != "ceiling" and len(found := rows.of(kind)) > 1:
            several = f"{len(found)} commands, machines, models or commits"
            yield f"{kind.capitalize()} rows come from {several}: each is judged by itself, and not against another."


def _code(rows: Rows) -> Iterator[str]:
    commits = sorted({row.provenance.commit for row in rows.records})
    if len(commits) > 1:
        yield f"The rows come from {len(commits)} commits: {', '.join(commits)}."
    if any(commit.endswith("+changes") for commit in commits):
        yield "The checkout had changes that are not committed: the commit alone does not give these figures again."
    if "unknown" in commits:
        yield "Of some rows the commit is not known."


def _client(rows: Rows) -> Iterator[str]:
    yield from filter(None, map(client_doubt, rows.of("online", "api")))


def client_doubt(session: Session) -> str:
    """Where the client itself may be what was measured, as the benchmark noted in rows; '' where it noted nothing."""
    told = [row for row in session.rows if "bottleneck" in row.subject.note]
    if not told:
        return ""
    cpu = [row.metrics["client_cpu"] for row in told if "of a core" in row.subject.note]
    lag = [row.metrics["client_lag_ms"] for row in told if "ms late" in row.subject.note]
    facts = [f"it used up to {max(cpu):.0%} of a core"] if cpu else []
    facts += [f"it sent a call up to {max(lag):.1f} ms late"] if lag else []
    why = f": {' and '.join(facts)}" if facts else ""
    return f"The client may have been the bottleneck in {len(told)} of {len(session.rows)} {session.kind} rows{why}."


def _resumed(rows: Rows) -> Iterator[str]:
    for session in rows.sessions:
        if num := sum(bool(row.provenance.continues) for row in session.rows):
            yield (
                f"{num} of {len(session.rows)} {session.kind} rows come of a run that was interrupted and resumed: "
                "they are no pairs with what was measured before."
            )


def _repeats(rows: Rows) -> Iterator[str]:
    for session in rows.of(*HEADLINES):
        metric = next((name for name in HEADLINES[session.kind] if name in session.metrics), None)
        counts = [
            len(found)
            for case in session.cases
            for label in session.labels
            if metric and (found := session.values(label, case, metric))
        ]
        if not counts:
            continue
        if session.kind == "kernels" and max(counts) == 1:
            yield "Kernels were timed in one run: intervals come from blocks of its timings and hold within that run."
        elif min(counts) < MIN_REPEATS:
            repeats = "2 repeats" if min(counts) == 2 else "1 repeat"
            yield f"Some {session.kind} figures have {repeats}: nothing is said about their noise."
        elif min(counts) < 5:
            repeats = f"{min(counts)} repeats"
            yield f"Some {session.kind} figures have {repeats}: only large differences can be told from noise."


def _drift(rows: Rows) -> Iterator[str]:
    for session in rows.of("offline", "online", "api", "ttft"):
        drift = machine_drift(session)
        if drift > MAX_DRIFT:
            shared = (
                "taken over all subjects; in pairs of repeats what they share cancels, the rest widens the intervals"
            )
            yield f"The machine drifted by {drift:.0%} between the repeats of {session.kind}, {shared}."


def machine_drift(session: Session) -> float:
    """How far the fastest repeat lies above the slowest, all subjects and cases taken together; 0 for a single one."""
    metric = next((name for name in HEADLINES.get(session.kind, ()) if name in session.metrics), "")
    logs: dict[object, list[float]] = {}
    for label in session.labels:
        for case in session.cases:
            found = {pair: value for pair, value in session.values(label, case, metric).items() if value > 0}
            middle = fmean(map(math.log, found.values())) if found else 0.0
            for pair, value in found.items():
                logs.setdefault(pair, []).append(math.log(value) - middle)
    means = [fmean(found) for found in logs.values()]
    return math.expm1(max(means) - min(means)) if len(means) > 1 else 0.0


def _caches(rows: Rows) -> Iterator[str]:
    for session in rows.of("offline", "online", "api", "ttft"):
        states = sorted({row.conditions.cache for row in session.rows})
        if len(states) > 1 and session.kind != "ttft":
            yield f"The prefix cache was {' in some and '.join(states)} in other {session.kind} rows."
        elif states == ["not recorded"]:
            yield f"The state of the prefix cache was not recorded in the {session.kind} rows."
        warm = {row.conditions.warmup for row in session.rows}
        if warm & {"", "none"}:
            yield f"Some {session.kind} rows had no warm-up: first-time costs are in them."
        shares = [row.metrics["cached_prompt_share"] for row in session.rows if row.metrics.get("cached_prompt_share")]
        if shares and max(shares) > 0.01:
            yield f"Up to {max(shares):.0%} of the prompt tokens of {session.kind} came from a prefix cache."


def _subjects(rows: Rows) -> Iterator[str]:
    ran = [row for row in rows.records if row.status == "ok" and row.kind != "ceiling"]
    others = sorted({row.subject.label for row in ran if row.subject.engine not in ("tessera", "none", "torch")})
    if others:
        named = ", ".join(others)
        yield f"{named}: other engines, not proven by us which kernels ran; what is not asked of all is their default."
    for session in rows.of("offline", "online", "api", "ttft"):
        dtypes = {label: ", ".join(session.dtypes(label)) for label in session.labels if session.dtypes(label)}
        if len(set(dtypes.values())) > 1:
            told = "; ".join(f"{label} {dtype}" for label, dtype in dtypes.items())
            yield f"Not all {session.kind} subjects computed in one type: {told}."
    if any(
        row.subject.resolved.get(phase, [asked]) != [asked]
        for row in ran
        for phase, asked in row.subject.asked.items()
        if asked != "auto"
    ):
        yield "A subject was asked for one backend and served by another: see what ran."
    if rows.lost:
        yield f"{len(rows.lost)} of {len(rows.records)} rows have no figures; their reasons are under What did not run."
