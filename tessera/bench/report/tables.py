"""Tables: who stands where, what ran and its proof, memory, answers beside speed, what was lost, everything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from tessera.bench.reasons import Lost, gathered
from tessera.bench.record import Record, Subject, Value
from tessera.bench.report.compared import Standing, baseline_of, standings
from tessera.bench.report.document import Cell, Table, Tone
from tessera.bench.report.figures import named
from tessera.bench.report.kernels_seen import symbols_of
from tessera.bench.report.metrics import HEADLINES, digits, number, title
from tessera.bench.report.quality import mean_of, stderr_names
from tessera.bench.report.rows import Rows, Session
from tessera.bench.statistics import median

MAX_SYMBOLS = 3


def standing_table(rows: Rows, session: Session, asked: str | None) -> Table | None:
    """Every subject against the baseline in each headline metric; None where there is nothing to compare."""
    baseline = baseline_of(session.labels, asked)
    metrics = [name for name in HEADLINES.get(session.kind, ()) if name in session.metrics]
    found = [each for metric in metrics for each in standings(session, baseline, metric)]
    found = [each for each in found if session.subject(each.label).engine != "none"]  # a figure and no rival
    if not found:
        return None
    body = [_standing_row(rows, each) for each in found]
    few = any(each.comparison.verdict == "too few repeats" for each in found)
    note = "Above 1 is better, for latencies too. Verdicts are corrected for the number of rows (Holm)."
    if few:
        note += " Fewer than three repeats have no interval."
    columns = ["subject", "metric", "ratio", "95% interval", "repeats", "cases", "verdict"]
    return Table(f"{_name(session.kind)}: how many times better than {baseline}", columns, body, note)


def _standing_row(rows: Rows, each: Standing) -> list[Cell | str]:
    found = each.comparison
    interval = "-" if found.verdict == "too few repeats" else f"{found.low:.2f} to {found.high:.2f}"
    tones: dict[str, Tone] = {"faster": "good", "slower": "bad"}
    verdict = Cell(found.verdict, tone=tones.get(found.verdict, "muted"))
    repeats, cases = str(found.num_repeats), each.cases_text
    return [named(rows, each.label), title(each.metric), f"{found.ratio:.2f}x", interval, repeats, cases, verdict]


def what_ran(rows: Rows) -> Table:
    """Asked, resolved, seen by a profiler: per subject and phase, once for each difference."""
    shares: dict[tuple[str, ...], list[float]] = {}
    for row in rows.records:
        if row.status != "ok" or row.kind == "ceiling":
            continue
        for phase in dict.fromkeys([*row.subject.asked, *row.subject.resolved]) or [""]:
            proofs = [proof for proof in row.subject.proofs if proof.phase == phase]
            found = shares.setdefault((row.subject.label, *_ran(row.subject, phase)), [])
            found += [proof.time_share for proof in proofs if proof.time_share is not None]
    body: list[list[Cell | str]] = [
        [named(rows, label), *cells, _percent(found)] for (label, *cells), found in shares.items()
    ]
    columns = ["subject", "phase", "asked", "resolved", "proven: kernels that a profiler saw", "share of the step"]
    return Table("What was asked for, what served, and what ran", columns, body)


def _ran(subject: Subject, phase: str) -> list[str]:
    symbols = symbols_of(subject, phase)
    more = f" and {len(symbols) - MAX_SYMBOLS} more" if len(symbols) > MAX_SYMBOLS else ""
    unproven = subject.note if "not proven" in subject.note else f"not proven: {subject.note}".rstrip(": ")
    seen = ", ".join(symbols[:MAX_SYMBOLS]) + more if symbols else unproven
    resolved = ", ".join(subject.resolved.get(phase, [])) or "not known"
    return [phase or "all", subject.asked.get(phase, "-"), resolved, seen]


def _name(kind: str) -> str:
    return kind.upper() if kind in ("api", "ttft") else kind.capitalize()


def _percent(shares: Sequence[float]) -> str:
    low, high = (f"{100 * share:.0f}" for share in (min(shares, default=0), max(shares, default=0)))
    if not shares:
        return "-"
    return f"{low}%" if low == high else f"{low} to {high}%"


def memory(rows: Rows) -> Table | None:
    """Peak memory of each subject in each session; None where no row has it."""
    body: list[list[Cell | str]] = []
    metrics = [
        name
        for name in dict.fromkeys(name for each in rows.sessions for name in each.metrics)
        if name.endswith("memory_bytes")
    ]
    for session in rows.sessions:
        for label in session.labels:
            for metric in metrics:
                values = [v for case in session.cases for v in session.values(label, case, metric).values()]
                if values:
                    cells = [number(metric, value) for value in (median(values), max(values))]
                    body.append([named(rows, label), session.kind, title(metric), *cells])
    return Table("Memory", ["subject", "benchmark", "what", "median", "highest"], body) if body else None


def answers(rows: Rows, session: Session) -> Table:
    """What quality measured, with the offline speed beside it where that was measured too."""
    metrics = [name for name in session.metrics if not name.endswith("stderr")]
    speed = _speeds(rows, session)
    columns = [
        "subject",
        *(["case"] if len(session.cases) > 1 else []),
        *(["output tok/s"] if speed else []),
        *map(title, metrics),
    ]
    body: list[list[Cell | str]] = []
    for case in session.cases:
        for label in session.labels:
            cells = [_answer(session, label, case, metric) for metric in metrics]
            if any(cell != "-" for cell in cells):
                extra = [session.case_text(case)] if len(session.cases) > 1 else []
                body.append(
                    [named(rows, label), *extra, *([_speed(speed, session, label, case)] if speed else []), *cells]
                )
    note = (
        "Against the reference: KL and errors are better near 0, equal tokens and scores high. ± is a standard error."
    )
    return Table("Answers beside speed", columns, body, note)


def _answer(session: Session, label: str, case: str, metric: str) -> str:
    value, error = mean_of(session, label, case, metric), _stderr(session, label, case, metric)
    if value is None:
        return "-"
    return number(metric, value) + (f" ± {digits(error)}" if error is not None else "")


def _stderr(session: Session, label: str, case: str, metric: str) -> float | None:
    found = (mean_of(session, label, case, name) for name in stderr_names(metric))
    return next((value for value in found if value is not None), None)


def _speeds(rows: Rows, session: Session) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Offline output tok/s of each label in each type, by case; on the machine and of the model of `session` only."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for other in rows.of("offline"):
        if other.place == session.place:
            for row in other.rows:
                if "output_tok_s" in row.metrics:
                    cases = found.setdefault((row.subject.label, row.conditions.dtype), {})
                    cases.setdefault(row.case_key, []).append(row.metrics["output_tok_s"])
    return found


def _speed(speeds: dict[tuple[str, str], dict[str, list[float]]], session: Session, label: str, case: str) -> str:
    """Of the one offline case; `-` where there are several, for their median would be nobody's."""
    dtypes = {row.conditions.dtype for row in session.rows if (row.subject.label, row.case_key) == (label, case)}
    cases = [values for dtype in dtypes for values in speeds.get((label, dtype), {}).values()]
    return digits(median(cases[0])) if len(cases) == 1 else "-"


def lost(rows: Rows) -> Table | None:
    """Rows without figures and why, in one line all that one reason kept out; None where there are none."""
    alike: dict[tuple[str, ...], list[Lost]] = {}
    for each in gathered(rows.lost):
        alike.setdefault((each.status, each.reason, *each.labels), []).append(each)
    body = [_lost_row(rows, found) for found in alike.values()]
    columns = ["benchmark", "subjects", "status", "rows", "case", "reason"]
    return Table("Rows without figures", columns, body) if body else None


def _lost_row(rows: Rows, found: Sequence[Lost]) -> list[Cell | str]:
    """Of the same subjects, lost for the same reason in one benchmark or more."""
    first, lost = found[0], [row for each in found for row in each.rows]
    who = named(rows, first.labels[0]) if len(first.labels) == 1 else ", ".join(first.labels)
    status = Cell(first.status, tone="bad" if first.status == "failed" else "muted")
    return [", ".join(each.kind for each in found), who, status, str(len(lost)), _cases(lost), first.reason]


def succeeded(rows: Rows) -> str:
    """`42/48 succeeded`, and where not all did how the others ended."""
    ok = sum(row.status == "ok" for row in rows.records)
    others = Counter(row.status for row in rows.lost)
    return (
        f"{ok}/{len(rows.records)} succeeded" + "".join(f", {count} {status}" for status, count in others.items()) + "."
    )


def _cases(found: Sequence[Record]) -> str:
    texts = list(dict.fromkeys(_case_line(row.case) for row in found))
    if len(texts) > 1 and found[0].status == "unavailable":
        return f"{len(texts)} cases"
    return texts[0] if len(texts) == 1 else f"{texts[0]} and {len(texts) - 1} more"


def _case_line(case: dict[str, Value]) -> str:
    return ", ".join(f"{name} {value}" for name, value in case.items())


def everything(rows: Rows, session: Session) -> Table:
    """Every metric of every case and subject, whatever it means."""
    columns = ["case", "subject", "metric", "mean", "lowest", "highest", "rows"]
    body: list[list[Cell | str]] = []
    for case in session.cases:
        for label in session.labels:
            for metric in session.metrics:
                values = list(session.values(label, case, metric).values())
                if values:
                    cells = [number(metric, value) for value in (fmean(values), min(values), max(values))]
                    body.append(
                        [session.case_text(case) or "all", named(rows, label), title(metric), *cells, str(len(values))]
                    )
    return Table(f"{_name(session.kind)}: all figures", columns, body)
