"""Subjects of a session against a baseline: repeat by repeat, over the cases that both have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tessera.bench.report.metrics import higher_is_better
from tessera.bench.report.rows import Session
from tessera.bench.statistics import Comparison, Verdict, compare, compare_rounds, geometric_mean, judged

BASELINES = ("naive", "torch_sdpa", "torch_sdpa:math")
"""Taken, in this order, where none is named: what everybody has."""


@dataclass(frozen=True)
class Standing:
    """One subject against the baseline in one metric, over the cases that all candidates have."""

    label: str
    baseline: str
    metric: str
    comparison: Comparison
    num_cases: int
    of_cases: int
    """Of how many cases there are."""

    @property
    def cases_text(self) -> str:
        """`3`, or `2 of 3` where not all cases were measured by all."""
        return str(self.of_cases) if self.num_cases == self.of_cases else f"{self.num_cases} of {self.of_cases}"


def is_named(name: str, label: str) -> bool:
    """Whether a label is this one, with another decode, split or in one of several types."""
    return label == name or re.match(rf"{re.escape(name)}([+,]| \[)", label) is not None


def baseline_of(labels: Sequence[str], asked: str | None) -> str:
    """The one that was asked for, if it is there, else a common one (or it with another decode), else the first."""
    wanted = (asked, *BASELINES) if asked else BASELINES
    exact = [label for label in labels if label == asked]
    alike = [label for name in wanted for label in labels if is_named(name, label)]
    return next(iter([*exact, *alike, *labels]))


def standings(session: Session, baseline: str, metric: str, cases: Sequence[str] | None = None) -> list[Standing]:
    """Every other subject against the baseline, the best first, judged together.

    Ours are ranked over the cases that all of them share with the baseline, or the one with the hardest cases left out
    would win; another engine over those that it shares.
    """
    chosen = list(cases) if cases is not None else session.cases
    shared = {
        label: both
        for label in session.labels
        if label != baseline and (both := _shared(session, metric, label, baseline, chosen))
    }
    ours = [label for label in shared if session.subject(label).engine == "tessera"]
    common = [case for case in chosen if all(case in shared[label] for label in ours)]
    found: list[Standing] = []
    for label, own in shared.items():
        over = common if label in ours and common else own
        if comparison := against(session, metric, label, baseline, over):
            found.append(Standing(label, baseline, metric, comparison, len(over), len(chosen)))
    together = judged([each.comparison for each in found])
    found = [replace(each, comparison=comparison) for each, comparison in zip(found, together)]
    return sorted(found, key=lambda each: -each.comparison.ratio)


def best_supported(table: Sequence[Standing]) -> Standing:
    """The one to speak of first: what is known best, and of those equally well known the fastest.

    Surely faster comes before level, level before too few repeats to tell, and whoever is surely slower is last.
    """
    known_first: tuple[Verdict, ...] = ("faster", "no difference", "too few repeats", "slower")
    for verdict in known_first:
        if found := [each for each in table if each.comparison.verdict == verdict]:
            return max(found, key=lambda each: each.comparison.ratio)
    raise ValueError("nobody stands in an empty table")


def against(session: Session, metric: str, a: str, b: str, cases: Sequence[str]) -> Comparison | None:
    """How many times better `a` is than `b`; the geometric mean over cases where there are several.

    A pair is one repeat of both within one run, over those cases that both have in it; of kernels in a single run it
    is a round of timings, as all backends take turns. None where they share no case, where nobody knows which way is
    better, or where a value has no ratio.
    """
    higher, shared = higher_is_better(metric), _shared(session, metric, a, b, cases)
    if higher is None or not shared:
        return None
    x, y = _pairs(session, metric, a, b, shared)
    try:
        if len(x) == 1 and session.kind == "kernels" and (found := compare_rounds(_rounds(session, a, b, shared))):
            return found
        return compare(x, y, higher_is_better=higher)
    except ValueError:
        return None


def _shared(session: Session, metric: str, a: str, b: str, cases: Sequence[str]) -> list[str]:
    return [
        case
        for case in cases
        if session.values(a, case, metric).keys() & session.values(b, case, metric).keys()
        and all(value > 0 for label in (a, b) for value in session.values(label, case, metric).values())
    ]


def _pairs(session: Session, metric: str, a: str, b: str, cases: Sequence[str]) -> tuple[list[float], list[float]]:
    cells = [(session.values(a, case, metric), session.values(b, case, metric)) for case in cases]
    repeats = dict.fromkeys(pair for of_a, of_b in cells for pair in of_a if pair in of_b)
    x, y = list[float](), list[float]()
    for pair in repeats:
        both = [(of_a[pair], of_b[pair]) for of_a, of_b in cells if pair in of_a and pair in of_b]
        x.append(geometric_mean([value for value, _ in both]))
        y.append(geometric_mean([value for _, value in both]))
    return x, y


def _rounds(session: Session, a: str, b: str, cases: Sequence[str]) -> list[list[float]]:
    """For each case, how many times faster `a` was in each round."""
    samples = [(session.samples(a, case, "ms"), session.samples(b, case, "ms")) for case in cases]
    return [[of_b / of_a for of_a, of_b in zip(*each) if min(of_a, of_b) > 0] for each in samples]
