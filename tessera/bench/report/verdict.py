"""The verdict in words: who is faster, by how much, how sure that is, why, and at what price."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.bench.report.caveats import client_doubt
from tessera.bench.report.compared import Standing, baseline_of, best_supported, is_named, standings
from tessera.bench.report.kernels_seen import all_proven, because, explained, phase_facts
from tessera.bench.report.metrics import HEADLINES, number, title
from tessera.bench.report.quality import is_reference, losses, remarks
from tessera.bench.report.rows import Rows, Session
from tessera.bench.report.words import in_words, listed, repeats, spread, within_run
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
    is_theirs = any(is_named(asked, label) for label in session.labels) if asked else False
    baseline = baseline_of(ours if len(ours) > 1 and not is_theirs else session.labels, asked)
    table = standings(session, baseline, metric)
    if not table:
        return [prefix + f"{_where(session)}, no two subjects share a case: nothing is compared."]
    rivals = [each for each in table if each.label in ours] or table
    top = best_supported(rivals)
    best, other, found = _leader(top)
    if session.kind == "online":
        first, why = _online(session, best, other), ""
    else:
        first, why = _one(session, best, other, found, metric, top), explained(session, best, other)
    peers = [label for label in session.labels if label not in (*ours, best, other)]
    noisy = _noisy(rivals, top)
    rest = [
        why,
        _other_dtype(session, best, other),
        client_doubt(session),
        *noisy.values(),
        _level(session, best, metric, [other, *noisy, *peers]),
        _price(rows, session, best, other),
        _peers(session, best, metric, peers),
    ]
    more = " ".join(part for part in rest if part)
    return [prefix + first, *([more] if more else [])]


def _noisy(table: Sequence[Standing], top: Standing) -> dict[str, str]:
    """What was faster than the leader, and is not known to be: a sentence for each label."""
    return {
        each.label: f"{each.label} had {each.comparison.ratio:.2f}x of {each.baseline}, which cannot be told from "
        f"noise ({spread(each.comparison)})."
        for each in table
        if each.comparison.ratio > max(1.0, top.comparison.ratio)
    }


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


def _one(session: Session, best: str, other: str, found: Comparison, metric: str, top: Standing) -> str:
    where = _WHERE[session.kind]
    cases = f", geometric mean of {top.cases_text} cases" if top.of_cases > 1 else ""
    factor = f"{found.ratio:.2f}x"
    if found.verdict == "faster":
        return f"{best} is {factor} faster {where} than {other} ({title(metric)}{cases}; {spread(found)})."
    if found.verdict == "too few repeats":
        doubt = f"{repeats(found)} cannot tell that from noise"
        return f"{best} was {factor} as fast {where} as {other} ({title(metric)}{cases}), but {doubt}."
    state = "level" if found.is_level else "not told apart"
    return (
        f"{best} and {other} are {state} {where}: no difference that {repeats(found)} can show "
        f"({title(metric)}{cases}; ratio {found.ratio:.2f}, 95% interval {found.low:.2f} to {found.high:.2f})."
    )


def _online(session: Session, best: str, other: str) -> str:
    parts = []
    facts = phase_facts(session, best, other)
    for metric in HEADLINES["online"]:
        found = next((each for each in standings(session, other, metric) if each.label == best), None)
        if found:
            comparison = found.comparison
            differs = comparison.verdict in ("faster", "slower")
            known = differs or comparison.is_level
            reason = because(facts.get(_PHASE_OF.get(metric, "")), differs) if known else ""
            name = title(metric).removesuffix(" p50 (ms)")
            parts.append(f"{name} {in_words(comparison)}{reason}")
    scales = len(session.cases)
    over = f" over {scales} loads" if scales > 1 else ""
    proof = " Proven by kernel symbols on this machine." if all_proven(facts.values()) else ""
    return f"Online, {best} against {other}{over}: {'; '.join(parts)}.{proof}" if parts else ""


def _level(session: Session, best: str, metric: str, told: Sequence[str]) -> str:
    """Who cannot be told from the leader, and was not spoken of."""
    same = [
        each.label
        for each in standings(session, best, metric)
        if each.comparison.verdict == "no difference" and each.label not in told
    ]
    return f"No difference between {best} and {listed(same)} can be shown." if same else ""


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
        table = standings(session, baseline, "ms_median", cases)
        if not table:
            continue
        top = best_supported(table)
        best, other, comparison = _leader(top)
        races = [row for row in medians.values() if len(row) > 1]
        wins = sum(min(row, key=row.__getitem__) == best for row in races)
        state = in_words(comparison) if comparison.num_repeats > 1 else within_run(comparison)
        noisy = " ".join(_noisy(table, top).values())
        mean = f", geometric mean of {top.cases_text} cases" if top.of_cases > 1 else ""
        where = f"{wins} of {len(races)} cases" if len(races) > 1 else "the one case" if wins else "no case"
        found.append(
            f"Kernels, {phase or 'all'}: {best} has the shortest median in {where} with a rival; "
            f"against {other} it is {state}{mean}." + (f" {noisy}" if noisy else "")
        )
    return found


def _medians(session: Session, case: str) -> dict[str, float]:
    values = {label: list(session.values(label, case, "ms_median").values()) for label in session.labels}
    return {label: median(found) for label, found in values.items() if found}


def _price(rows: Rows, session: Session, best: str, other: str) -> str:
    """What the faster one loses in quality, on the same machine, of the same model in the same type."""
    dtypes = set(session.dtypes(best)) & set(session.dtypes(other))
    found = [
        loss
        for asked in rows.of("quality")
        if asked.place == session.place and {best, other} <= set(asked.labels)
        for loss in losses(asked, best, other, dtypes)
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
            texts.append(f"Quality: nothing measured shows {listed(same)} to answer worse than {baseline}.")
        elif not others:
            texts.append(f"Quality: only {baseline} was measured; its figures are below.")
        if said := [text for label in others for text in remarks(session, label, baseline)]:
            texts[-1] += " " + " ".join(said)
        if any(is_reference(session, baseline, case) for case in session.cases):
            texts[-1] += f" {baseline} in float32 is the reference itself: its distance from it says nothing."
    return texts


def _other_dtype(session: Session, best: str, other: str) -> str:
    a, b = session.dtypes(best), session.dtypes(other)
    return f"They ran in different types: {', '.join(a)} against {', '.join(b)}." if a and b and a != b else ""


def _where(session: Session) -> str:
    return _WHERE[session.kind].capitalize()
