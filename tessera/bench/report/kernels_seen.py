"""What two subjects ran in each phase, from what resolved and what a profiler saw: the reason behind a figure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tessera.bench.record import Subject


@dataclass(frozen=True)
class PhaseFact:
    """What `a` and `b` ran in one phase."""

    phase: str
    a: str
    b: str
    same: bool
    """The same backends, and the same kernel symbols where both were profiled."""
    proven: bool
    """A profiler saw all of it."""


def phase_facts(a: Subject, b: Subject) -> dict[str, PhaseFact]:
    """Of the phases that both have."""
    phases = [phase for phase in a.resolved if phase in b.resolved]
    return {phase: _fact(phase, a, b) for phase in phases}


def explained(a: Subject, b: Subject) -> str:
    """A sentence or two: what differs, what does not, and whether it is proven; '' where nothing is known."""
    facts = list(phase_facts(a, b).values())
    if not facts:
        unknown = " and ".join(each.label for each in (a, b) if not each.resolved)
        return f"Which kernels {unknown} ran is not known." if unknown else ""
    parts = [f"both {_verb(fact.phase)} with {fact.a}" for fact in facts if fact.same]
    parts += [f"{fact.phase} differs: {fact.a} against {fact.b}" for fact in facts if not fact.same]
    text = "; ".join(parts)
    proof = "proven by kernel symbols on this machine" if all(fact.proven for fact in facts) else "not proven"
    return f"{text[0].upper()}{text[1:]}; {proof}."


def because(fact: PhaseFact | None, differs: bool) -> str:
    """What the phase's kernels have to say about a metric of that phase that differs or does not; '' for nothing."""
    if fact is None:
        return ""
    if fact.same and not differs:
        return f", because both {_verb(fact.phase)} with {fact.a}"
    if fact.same:
        return f", although both {_verb(fact.phase)} with {fact.a}, so that the cause lies elsewhere in the step"
    if differs:
        return f": {fact.phase} ran {fact.a} against {fact.b}"
    return f", although {fact.phase} ran {fact.a} against {fact.b}"


def symbols_of(subject: Subject, phase: str) -> list[str]:
    """Names of the kernels that were seen, sorted."""
    return sorted({use.name for proof in subject.proofs if proof.phase == phase for use in proof.symbols})


def _fact(phase: str, a: Subject, b: Subject) -> PhaseFact:
    names = [", ".join(subject.resolved[phase]) for subject in (a, b)]
    seen = [symbols_of(subject, phase) for subject in (a, b)]
    same = set(a.resolved[phase]) == set(b.resolved[phase]) and (_same(*seen) or not all(seen))
    if not same and names[0] == names[1]:
        names = [f"{name} ({', '.join(symbols)})" for name, symbols in zip(names, seen)]
    return PhaseFact(phase, names[0], names[1], same, all(seen))


def _same(a: list[str], b: list[str]) -> bool:
    """Kernels that a compiler numbered anew in each process are the same: `graph_3_kernel` and `graph_5_kernel`."""
    x, y = ({re.sub(r"\bgraph_\d+", "graph", symbol) for symbol in symbols} for symbols in (a, b))
    return x == y


def _verb(phase: str) -> str:
    return phase if phase in ("prefill", "decode") else f"run {phase}"
