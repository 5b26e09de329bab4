"""What two subjects ran in each phase, from what resolved and what a profiler saw: the reason behind a figure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tessera.bench.record import Subject
from tessera.bench.report.rows import Session


@dataclass(frozen=True)
class PhaseFact:
    """What `a` and `b` ran in one phase, all their rows taken together."""

    phase: str
    a: str
    b: str
    same: bool
    """The same kernel symbols where both were profiled, whatever they are called; else the same backends."""
    proven: bool
    """A profiler saw all of it, in every row."""
    varying: tuple[str, ...] = ()
    """Those of the two that did not run the same in all their rows: then nothing follows from it."""


def phase_facts(session: Session, a: str, b: str) -> dict[str, PhaseFact]:
    """Of the phases that both labels have."""
    phases = [
        list(dict.fromkeys(phase for each in session.subjects(label) for phase in each.resolved)) for label in (a, b)
    ]
    return {phase: _fact(session, phase, a, b) for phase in phases[0] if phase in phases[1]}


def explained(session: Session, a: str, b: str) -> str:
    """A sentence or two: what differs, what does not, and whether it is proven; '' where nothing is known."""
    facts = list(phase_facts(session, a, b).values())
    if not facts:
        unknown = " and ".join(label for label in (a, b) if not any(each.resolved for each in session.subjects(label)))
        return f"Which kernels {unknown} ran is not known." if unknown else ""
    if varying := [fact for fact in facts if fact.varying]:
        return " ".join(
            f"{' and '.join(fact.varying)} did not {_verb(fact.phase)} the same way in all rows." for fact in varying
        )
    parts = [f"both {_verb(fact.phase)} with {fact.a}" for fact in facts if fact.same]
    parts += [f"{fact.phase} differs: {fact.a} against {fact.b}" for fact in facts if not fact.same]
    text = "; ".join(parts)
    proof = "proven by kernel symbols on this machine" if all_proven(facts) else "not proven"
    return f"{text[0].upper()}{text[1:]}; {proof}."


def because(fact: PhaseFact | None, differs: bool) -> str:
    """What the phase's kernels have to say about a metric of that phase that differs or is level; '' for nothing."""
    if fact is None:
        return ""
    if fact.varying:
        return f" ({' and '.join(fact.varying)} did not {_verb(fact.phase)} the same way in all rows)"
    if fact.same and not differs:
        return f", because both {_verb(fact.phase)} with {fact.a}"
    if fact.same:
        return f", although both {_verb(fact.phase)} with {fact.a}, so that the cause lies elsewhere in the step"
    if differs:
        return f": {fact.phase} ran {fact.a} against {fact.b}"
    return f", although {fact.phase} ran {fact.a} against {fact.b}"


def all_proven(facts: Iterable[PhaseFact]) -> bool:
    """Whether there are facts, and each was seen by a profiler in every row."""
    found = list(facts)
    return bool(found) and all(fact.proven and not fact.varying for fact in found)


def symbols_of(subject: Subject, phase: str) -> list[str]:
    """Names of the kernels that were seen, sorted."""
    return sorted({use.name for proof in subject.proofs if proof.phase == phase for use in proof.symbols})


def _fact(session: Session, phase: str, a: str, b: str) -> PhaseFact:
    rows = [[each for each in session.subjects(label) if phase in each.resolved] for label in (a, b)]
    names = [", ".join(dict.fromkeys(name for each in found for name in each.resolved[phase])) for found in rows]
    seen = [sorted({symbol for each in found for symbol in symbols_of(each, phase)}) for found in rows]
    proven = all(symbols_of(each, phase) for found in rows for each in found)
    varying = tuple(label for label in (a, b) if _varies(session, label, phase))
    same = _alike(seen[0]) == _alike(seen[1]) if all(seen) else set(names[0].split(", ")) == set(names[1].split(", "))
    if not same and names[0] == names[1]:
        names = [f"{name} ({', '.join(symbols)})" for name, symbols in zip(names, seen)]
    if same and names[0] != names[1]:
        names[0] = f"the same kernels, under the names {names[0]} and {names[1]}"
    return PhaseFact(phase, names[0], names[1], same, proven, varying)


def _varies(session: Session, label: str, phase: str) -> bool:
    """Whether rows were served by other backends, or repeats of one case by other kernels."""
    rows = [row for row in session.rows if row.subject.label == label and row.subject.resolved]
    backends = {frozenset(row.subject.resolved.get(phase, [])) for row in rows}
    kernels: dict[str, set[frozenset[str]]] = {}
    for row in rows:
        kernels.setdefault(row.case_key, set()).add(_alike(symbols_of(row.subject, phase)))
    return len(backends) > 1 or any(len(found) > 1 for found in kernels.values())


def _alike(symbols: Iterable[str]) -> frozenset[str]:
    """Kernels that a compiler numbered anew in each process are the same: `graph_3_kernel` and `graph_5_kernel`."""
    return frozenset(re.sub(r"\bgraph_\d+", "graph", symbol) for symbol in symbols)


def _verb(phase: str) -> str:
    return phase if phase in ("prefill", "decode") else f"run {phase}"
