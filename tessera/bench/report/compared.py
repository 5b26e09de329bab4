"""Subjects of a session against a baseline: repeat by repeat, over the cases that both have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tessera.bench.report.metrics import higher_is_better
from tessera.bench.report.rows import Session
from tessera.bench.statistics import Comparison, block_medians, compare, geometric_mean, judged

HEADLINES = {
    "offline": ("output_tok_s",),
    "online": ("ttft_ms_p50", "tpot_ms_p50", "itl_ms_p50", "e2e_ms_p50"),
    "api": ("generation_tok_s", "ttft_ms_max"),
    "ttft": ("ttft_ms",),
    "kernels": ("ms_median",),
}
"""Metrics that the verdict speaks of, the first one first."""
BASELINES = ("naive", "torch_sdpa", "torch_sdpa:math")
"""Taken, in this order, where none is named: what everybody has."""


@dataclass(frozen=True)
class Standing:
    """One subject against the baseline in one metric, over all cases that both have."""

    label: str
    baseline: str
    metric: str
    comparison: Comparison
    num_cases: int


def baseline_of(labels: Sequence[str], asked: str | None) -> str:
    """The one that was asked for, if it is there, else a common one (or it with another decode), else the first."""
    wanted = (asked, *BASELINES) if asked else BASELINES
    alike = [
        label for name in wanted for label in labels if label == name or re.match(rf"{re.escape(name)}[+,]", label)
    ]
    return alike[0] if alike else labels[0]


def standings(session: Session, baseline: str, metric: str, cases: Sequence[str] | None = None) -> list[Standing]:
    """Every other subject against the baseline, the best first, judged together."""
    chosen = list(cases) if cases is not None else session.cases
    found: list[Standing] = []
    for label in session.labels:
        comparison = against(session, metric, label, baseline, chosen) if label != baseline else None
        if comparison:
            shared = _shared(session, metric, label, baseline, chosen)
            found.append(Standing(label, baseline, metric, comparison, len(shared)))
    together = judged([each.comparison for each in found])
    found = [replace(each, comparison=comparison) for each, comparison in zip(found, together)]
    return sorted(found, key=lambda each: -each.comparison.ratio)


def against(session: Session, metric: str, a: str, b: str, cases: Sequence[str]) -> Comparison | None:
    """How many times better `a` is than `b`; the geometric mean over cases where there are several.

    A pair is one repeat of both within one run, over those cases that both have in it. None where they share no case,
    where nobody knows which way is better, or where a value has no ratio.
    """
    higher, shared = higher_is_better(metric), _shared(session, metric, a, b, cases)
    if higher is None or not shared:
        return None
    x, y = _pairs(session, metric, a, b, shared)
    try:
        if len(x) == 1 and session.kind == "kernels" and (blocks := _blocks(session, a, b, shared)):
            return replace(compare(*blocks, paired=False, higher_is_better=higher), num_repeats=1)
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


def _blocks(session: Session, a: str, b: str, cases: Sequence[str]) -> tuple[list[float], list[float]] | None:
    """Medians of blocks of one run's timings, over all cases; None where one has too few timings."""
    found: list[list[float]] = []
    for label in (a, b):
        rows = [block_medians(session.samples(label, case, "ms")) for case in cases]
        if not all(rows):
            return None
        found.append([geometric_mean(block) for block in zip(*rows)])
    return found[0], found[1]
