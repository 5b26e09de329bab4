"""The verdict in words: who is faster, by how much, how sure that is, why, and at what price."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tessera.bench.record import Subject
from tessera.bench.report.compared import HEADLINES, Standing, baseline_of, standings
from tessera.bench.report.kernels_seen import PhaseFact, because, explained, phase_facts
from tessera.bench.report.metrics import number, title
from tessera.bench.report.quality import losses
from tessera.bench.report.rows import Rows, Session
from tessera.bench.statistics import Comparison, median

_WHERE = {"offline": "offline", "online": "online", "api": "behind the API", "ttft": "to the first token"}
_PHASE_OF = {"ttft_ms_p50": "prefill", "tpot_ms_p50": "decode"}


def verdict(rows: Rows, asked: str | None) -> list[str]:
    """Paragraphs, the most telling first; says so where there is nothing to compare."""
    sessions = sorted(rows.of(*_WHERE), key=lambda session: list(_WHERE).index(session.kind))
    found = [parts for session in sessions if (parts := _session_verdict(rows, session, asked))]
    served = [*found[0], *(" ".join(parts) for parts in found[1:])] if found else []
    kernels = [text for session in rows.of("kernels") for text in _kernels(session, asked)]
    paragraphs = [*served, *kernels, *_quality(rows, asked)]
    if paragraphs:
        return paragraphs
    if any(row.status == "ok" for row in rows.records):
        return ["No two subjects were measured in one thing of which it is known which way is better: see the figures."]
    return [f"Nothing was measured: all {len(rows.lost)} rows failed or were unavailable; the reasons are below."]


def spread(found: Comparison) -> str:
    """`95% interval 1.31 to 1.39, 5 repeats`."""
    repeats = f"{found.num_repeats} repeat{'' if found.num_repeats == 1 else 's'}"
    if math.isinf(found.high):
        return repeats
    return f"95% interval {found.low:.2f} to {found.high:.2f}, {repeats}"


def in_words(found: Comparison) -> str:
    """`1.35x faster (95% interval ...)`, `unchanged (no difference that 5 repeats can show, ...)`."""
    if found.verdict == "no difference":
        return f"unchanged (no difference that {spread_repeats(found)} can show: {found.low:.2f} to {found.high:.2f})"
    factor = found.ratio if found.ratio >= 1 else 1 / found.ratio
    word = "faster" if found.ratio >= 1 else "slower"
    if found.verdict == "too few repeats":
        return f"{factor:.2f}x {word} in {spread_repeats(found)}, too few to tell from noise"
    return f"{factor:.2f}x {word} ({spread(found if found.ratio >= 1 else found.inverse)})"


def spread_repeats(found: Comparison) -> str:
    """`5 repeats`; of kernels, `1 run`."""
    return f"{found.num_repeats} repeat{'' if found.num_repeats == 1 else 's'}"


def _session_verdict(rows: Rows, session: Session, asked: str | None) -> list[str]:
    """The finding, and what there is to say about it; [] for nothing."""
    metric = next((name for name in HEADLINES[session.kind] if name in session.metrics), None)
    if metric is None:
        return []
    prefix = f"On {session.where}: " if len({each.where for each in rows.of(session.kind)}) > 1 else ""
    if len(session.labels) == 1:
        return [prefix + _alone(session, metric)]
    if session.kind == "ttft":
        return [prefix + text for text in [_first_token(session, asked)] if text]
    ours = [label for label in session.labels if session.subject(label).engine == "tessera"]
    baseline = baseline_of(ours if len(ours) > 1 else session.labels, asked)
    table = standings(session, baseline, metric)
    if not table:
        return [prefix + f"{_where(session)}, no two subjects share a case: nothing is compared."]
    top = next((each for each in table if each.label in ours), table[0])
    best, other, found = _leader(top)
    a, b = session.subject(best), session.subject(other)
    if session.kind == "online":
        first, why = _online(session, best, other, phase_facts(a, b)), ""
    else:
        first, why = _one(session, best, other, found, metric, top.num_cases), explained(a, b)
    peers = [label for label in session.labels if label not in (*ours, best, other)]
    rest = [why, _price(rows, best, other), _level(session, best, metric, other), _peers(session, best, metric, peers)]
    more = " ".join(part for part in [*rest, _other_dtype(session, best, other)] if part)
    return [prefix + first, *([more] if more else [])]


def _peers(session: Session, best: str, metric: str, peers: Sequence[str]) -> str:
    """Other engines beside the best of ours."""
    found = [each for each in standings(session, best, metric) if each.label in peers]
    return " ".join(f"Another engine, {each.label}, against {best}: {in_words(each.comparison)}." for each in found)


def _first_token(session: Session, asked: str | None) -> str:
    """Each bar against the simple one; the network, which computes nothing, is a figure and no rival."""
    bars = [label for label in session.labels if session.subject(label).engine != "none"]
    baseline = baseline_of(bars, asked)
    found = [each for each in standings(session, baseline, "ttft_ms") if each.label in bars]
    parts = [f"{each.label} is {in_words(each.comparison)}" for each in found]
    for label in (label for label in session.labels if label not in bars):
        values = [value for case in session.cases for value in session.values(label, case, "ttft_ms").values()]
        parts.append(f"of it all, {label} is {number('ttft_ms', median(values))} ms")
    return f"To the first token, against {baseline}: {'; '.join(parts)}." if found else ""


def _alone(session: Session, metric: str) -> str:
    label = session.labels[0]
    values = [value for case in session.cases for value in session.values(label, case, metric).values()]
    over = f"{len(session.cases)} cases" if len(session.cases) > 1 else f"{len(values)} repeats"
    return (
        f"Only {label} was measured {_WHERE[session.kind]}: {title(metric)} {number(metric, median(values))}, "
        f"median of {over}. There is nothing to compare it with."
    )


def _leader(top: Standing) -> tuple[str, str, Comparison]:
    """The better one, the other, and how the better one does; the baseline where nothing beats it."""
    if top.comparison.ratio < 1 and top.comparison.verdict != "no difference":
        return top.baseline, top.label, top.comparison.inverse
    return top.label, top.baseline, top.comparison


def _one(session: Session, best: str, other: str, found: Comparison, metric: str, num_cases: int) -> str:
    where, cases = _WHERE[session.kind], f", geometric mean of {num_cases} cases" if num_cases > 1 else ""
    factor = f"{found.ratio:.2f}x"
    if found.verdict == "faster":
        return f"{best} is {factor} faster {where} than {other} ({title(metric)}{cases}; {spread(found)})."
    if found.verdict == "too few repeats":
        doubt = f"{spread_repeats(found)} cannot tell that from noise"
        return f"{best} was {factor} as fast {where} as {other} ({title(metric)}{cases}), but {doubt}."
    return (
        f"{best} and {other} are level {where}: no difference that {spread_repeats(found)} can show "
        f"({title(metric)}{cases}; ratio {found.ratio:.2f}, 95% interval {found.low:.2f} to {found.high:.2f})."
    )


def _online(session: Session, best: str, other: str, facts: dict[str, PhaseFact]) -> str:
    parts = []
    for metric in HEADLINES["online"]:
        found = next((each for each in standings(session, other, metric) if each.label == best), None)
        if found:
            comparison = found.comparison
            differs = comparison.verdict in ("faster", "slower")
            known = comparison.verdict != "too few repeats"
            reason = because(facts.get(_PHASE_OF.get(metric, "")), differs) if known else ""
            name = title(metric).removesuffix(" p50 (ms)")
            parts.append(f"{name} {in_words(comparison)}{reason}")
    scales = len(session.cases)
    over = f" over {scales} scales" if scales > 1 else ""
    proof = (
        " Proven by kernel symbols on this machine." if facts and all(fact.proven for fact in facts.values()) else ""
    )
    return f"Online, {best} against {other}{over}: {'; '.join(parts)}.{proof}" if parts else ""


def _level(session: Session, best: str, metric: str, other: str) -> str:
    """Who cannot be told from the leader."""
    same = [
        each.label
        for each in standings(session, best, metric)
        if each.comparison.verdict == "no difference" and each.label != other
    ]
    return f"No difference between {best} and {_and(same)} can be shown." if same else ""


def _kernels(session: Session, asked: str | None) -> list[str]:
    """A sentence for each phase."""
    found = []
    phases = list(dict.fromkeys(str(case.get("phase", "")) for case in session.case_of.values()))
    for phase in phases:
        cases = [key for key in session.cases if str(session.case_of[key].get("phase", "")) == phase]
        medians = {key: _medians(session, key) for key in cases}
        labels = list(dict.fromkeys(label for row in medians.values() for label in row))
        if len(labels) < 2:
            continue
        baseline = baseline_of(labels, asked)
        table = [each for each in standings(session, baseline, "ms_median", cases) if each.label in labels]
        if not table:
            continue
        best, other, comparison = _leader(table[0])
        wins = sum(bool(row) and min(row, key=row.__getitem__) == best for row in medians.values())
        state = in_words(comparison) if comparison.num_repeats > 1 else _single(comparison)
        found.append(
            f"Kernels, {phase or 'all'}: {best} has the shortest median in {wins} of {len(cases)} cases; against "
            f"{other} it is {state}, geometric mean of {table[0].num_cases} cases."
        )
    return found


def _single(found: Comparison) -> str:
    if found.verdict == "too few repeats":
        return f"{found.ratio:.2f}x as fast, with too few timings to tell from noise"
    if found.verdict == "no difference":
        return f"level (within one run: {found.low:.2f} to {found.high:.2f})"
    return f"{found.ratio:.2f}x as fast (95% interval within one run {found.low:.2f} to {found.high:.2f})"


def _medians(session: Session, case: str) -> dict[str, float]:
    values = {label: list(session.values(label, case, "ms_median").values()) for label in session.labels}
    return {label: median(found) for label, found in values.items() if found}


def _price(rows: Rows, best: str, other: str) -> str:
    """What the faster one loses in quality."""
    found = [
        loss
        for session in rows.of("quality")
        if {best, other} <= set(session.labels)
        for loss in losses(session, best, other)
    ]
    return f"The price: {best} answers worse; {'; '.join(found)}." if found else ""


def _quality(rows: Rows, asked: str | None) -> list[str]:
    texts = []
    for session in rows.of("quality"):
        baseline = baseline_of(session.labels, asked)
        others = [label for label in session.labels if label != baseline]
        worse = {label: found for label in others if (found := losses(session, label, baseline))}
        texts += [f"Quality: {label} is worse than {baseline}; {'; '.join(found)}." for label, found in worse.items()]
        if same := [label for label in others if label not in worse]:
            texts.append(f"Quality: nothing measured shows {_and(same)} to answer worse than {baseline}.")
        elif not others:
            texts.append(f"Quality: only {baseline} was measured; its figures are below.")
    return texts


def _other_dtype(session: Session, best: str, other: str) -> str:
    a, b = session.dtypes(best), session.dtypes(other)
    return f"They ran in different types: {', '.join(a)} against {', '.join(b)}." if a and b and a != b else ""


def _where(session: Session) -> str:
    return _WHERE[session.kind].capitalize()


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def subjects_of(rows: Rows) -> dict[str, Subject]:
    """Each label's first subject that ran."""
    return {label: session.subject(label) for session in reversed(rows.sessions) for label in session.labels}
