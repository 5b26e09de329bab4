"""Two result files against each other: what became better, what worse, what cannot be told from noise.

Repeats of one run share its process, its memory layout and its hour: how far two runs of one code lie apart is not
among them. So each run counts once, as the median of its repeats, and fewer than three runs a side are not judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from tessera.bench.record import Record
from tessera.bench.report.metrics import HEADLINES, higher_is_better
from tessera.bench.report.quality import (
    AGREEMENT,
    AGREEMENT_LOSS,
    KL_FACTOR,
    KL_FLOOR,
    agreement_p_value,
    disagreements,
    stderr_names,
)
from tessera.bench.statistics import Verdict, compare, holm, median, score_difference
from tessera.errors import ConfigError

Outcome = Literal["better", "worse", "no difference", "too few runs", "not judged"]
Key = tuple[str, str, str]
"""Kind, case, label."""

DEFAULT_METRICS = {name for names in HEADLINES.values() for name in names} | {
    "peak_memory_bytes",
    "kl_mean",
    *AGREEMENT,
}
Tested = tuple[float, Outcome]
"""A p value, and what is said if it is small enough among all others."""

_OUTCOMES: dict[Verdict, Outcome] = {
    "faster": "better",
    "slower": "worse",
    "no difference": "no difference",
    "too few repeats": "too few runs",
}


@dataclass(frozen=True)
class Change:
    """One metric of one case and label, in both files."""

    kind: str
    case: str
    label: str
    metric: str
    before: float
    """Mean over the runs of the first file, of each the median of its repeats."""
    after: float
    ratio: float | None
    """How many times better the second is; None where nobody knows which way is better or a value is not positive."""
    low: float | None
    high: float | None
    """95% interval; None where it is not known."""
    num_runs: int
    """Pairs; where unpaired of the side with fewer."""
    outcome: Outcome


@dataclass(frozen=True)
class Difference:
    """All of it."""

    changes: list[Change]
    only_before: list[str]
    """Rows that the second file lacks."""
    only_after: list[str]
    paired: bool
    """Whether the runs of the two files took turns, so that they are pairs."""

    @property
    def regressions(self) -> list[Change]:
        """Significant, and worse by more than the threshold."""
        return [change for change in self.changes if change.outcome == "worse"]

    @property
    def judged(self) -> list[Change]:
        """Those with a verdict; all others say nothing of the code, neither good nor bad."""
        return [change for change in self.changes if change.outcome not in ("too few runs", "not judged")]


def difference(
    before: Sequence[Record],
    after: Sequence[Record],
    *,
    threshold: float = 0.03,
    metrics: Sequence[str] = (),
    across_machines: bool = False,
) -> Difference:
    """Compare what has the same kind, case and label in both; all that is judged is corrected for its number (Holm).

    Each run is its median, and at least three a side are needed for a verdict. They are pairs where the runs of the two
    files took turns (A, B, A, B, ...), as drift then cancels; else Welch's test is used, and drift between the two is
    part of the difference. Answers have no chance in them and are judged from one run. `metrics` left out are those
    that a report speaks of; `all` is every one. ConfigError for files of other machines, models or types, for no
    common row and for a metric that neither has.
    """
    a, b = _ok(before), _ok(after)
    shared = [key for key in a if key in b]
    if not shared:
        raise ConfigError(
            "the two files have no kind, case and label with figures in common",
            "compare two runs of one command; `tessera bench report` shows what a file holds",
        )
    if not across_machines:
        _check_places(before, after)
    _check_metrics(metrics, [*a.values(), *b.values()])
    turns = _take_turns(before, after)
    pairs = [
        (key, name)
        for key in shared
        for name in dict.fromkeys(name for row in a[key] for name in row.metrics)
        if _is_wanted(key[0], name, metrics) and any(name in row.metrics for row in b[key])
    ]
    found = [_change(key, name, a[key], b[key], turns, threshold) for key, name in pairs]
    missing = [_text(key) for key in a if key not in b], [_text(key) for key in b if key not in a]
    return Difference(_judge(found), *missing, paired=turns is not None)


Turns = dict[str, int]
"""The number of each run, among those of its own file."""


def _ok(rows: Iterable[Record]) -> dict[Key, list[Record]]:
    found: dict[Key, list[Record]] = {}
    for row in rows:
        if row.status == "ok" and row.kind != "ceiling":
            found.setdefault((row.kind, row.case_key, row.subject.label), []).append(row)
    return found


def _text(key: Key) -> str:
    return f"{key[1].removeprefix(f'kind={key[0]} ')} {key[2]} ({key[0]})"


def _check_places(before: Sequence[Record], after: Sequence[Record]) -> None:
    machines, models, dtypes = ([_places(rows)[index] for rows in (before, after)] for index in range(3))
    for what, (x, y) in (("machine", machines), ("model", models), ("dtype", dtypes)):
        if (x and y and x.isdisjoint(y)) or (what == "machine" and x != y):
            raise ConfigError(
                f"the files differ in {what}: {', '.join(sorted(x)) or 'none'} and {', '.join(sorted(y)) or 'none'}",
                "a difference would not tell which code is faster; --across-machines compares nevertheless",
            )


def _places(rows: Sequence[Record]) -> tuple[set[str], set[str], set[str]]:
    """Machines, models and types of the rows with figures."""
    done = [row for row in rows if row.status == "ok"]
    models = {row.conditions.model for row in done} - {""}
    return {row.provenance.machine.name for row in done}, models, {row.conditions.dtype for row in done} - {""}


def _check_metrics(metrics: Sequence[str], rows: Iterable[Sequence[Record]]) -> None:
    there = {name for group in rows for row in group for name in row.metrics}
    for name in metrics:
        if name not in there and name != "all":
            raise ConfigError(f"--metric {name}: no row has it", f"there are: {', '.join(sorted(there))}")


def _is_wanted(kind: str, name: str, metrics: Sequence[str]) -> bool:
    if metrics:
        return name in metrics or "all" in metrics
    is_score = kind == "quality" and higher_is_better(name) is True
    return name in DEFAULT_METRICS or is_score or kind not in (*HEADLINES, "quality")


def _run(row: Record) -> str:
    """A run that was resumed is one."""
    return row.provenance.continues or row.provenance.run


def _take_turns(before: Sequence[Record], after: Sequence[Record]) -> Turns | None:
    """None unless each file has several runs and they alternate in time."""
    started: dict[tuple[str, int], str] = {}
    for side, rows in enumerate((before, after)):
        for row in rows:
            key = _run(row), side
            started[key] = min(row.provenance.started, started.get(key, row.provenance.started))
    order = sorted((when, *key) for key, when in started.items())
    sides = [side for _, _, side in order]
    alternate = all(x != y for x, y in pairwise(sides))
    runs = {run for _, run, _ in order}
    if len(sides) < 4 or len(sides) % 2 or not alternate or len(runs) != len(order):
        return None
    return {run: index // 2 for index, (_, run, _) in enumerate(order)}


def _medians(name: str, rows: Sequence[Record]) -> dict[str, float]:
    """Of each run's repeats."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if name in row.metrics:
            found.setdefault(_run(row), []).append(row.metrics[name])
    return {run: median(values) for run, values in found.items()}


def _change(
    key: Key, name: str, a: Sequence[Record], b: Sequence[Record], turns: Turns | None, threshold: float
) -> tuple[Change, Tested | None]:
    """With what is left to be corrected for the number of tests; None for what was not tested."""
    of_a, of_b = _medians(name, a), _medians(name, b)
    x, y = list(of_a.values()), list(of_b.values())
    kind, case = key[0], key[1].removeprefix(f"kind={key[0]} ")
    means = sum(x) / len(x), sum(y) / len(y)
    plain = Change(kind, case, key[2], name, *means, None, None, None, min(len(x), len(y)), "not judged")
    if kind == "quality" and (tested := _tested_answers(name, a[-1], b[-1], means)):
        return plain, tested
    higher = higher_is_better(name)
    if higher is None or name in AGREEMENT or min(*x, *y) <= 0:
        return plain, None
    both = sorted({turns[run] for run in of_a} & {turns[run] for run in of_b}) if turns else []
    if turns and both:
        x, y = ([{turns[run]: value for run, value in found.items()}[turn] for turn in both] for found in (of_a, of_b))
    found = compare(y, x, paired=bool(both), higher_is_better=higher, threshold=threshold)
    outcome = _OUTCOMES[found.verdict]
    known = outcome != "too few runs"
    low, high = (found.low, found.high) if known else (None, None)
    change = replace(plain, ratio=found.ratio, low=low, high=high, num_runs=found.num_repeats, outcome=outcome)
    return change, (found.p_value, outcome) if known else None


def _tested_answers(name: str, a: Record, b: Record, means: tuple[float, float]) -> Tested | None:
    """Of what has no chance in it, or has its own standard error; None for what repeats must show."""
    before, after = means
    if name == "kl_mean":
        worse = after >= KL_FACTOR * before and after > KL_FLOOR
        better = before >= KL_FACTOR * after and before > KL_FLOOR
        return 0.0 if worse or better else 1.0, _side(worse, better)
    if name in AGREEMENT:
        counts = disagreements(b.case, name, (after, before))
        far = abs(after - before) > AGREEMENT_LOSS
        return (agreement_p_value(counts), _side(far and after < before, far and after > before)) if counts else None
    errors = [next((row.metrics[each] for each in stderr_names(name) if each in row.metrics), None) for row in (a, b)]
    higher = higher_is_better(name)
    if errors[0] is None or errors[1] is None or higher is None:
        return None
    _, p_value = score_difference(before, errors[0], after, errors[1])
    return p_value, _side((after < before) is higher, (after > before) is higher)


def _side(worse: bool, better: bool) -> Outcome:
    return "worse" if worse else "better" if better else "no difference"


def _judge(found: Sequence[tuple[Change, Tested | None]]) -> list[Change]:
    """Of all that was tested, only what Holm's method lets stand."""
    kept = iter(holm([tested[0] for _, tested in found if tested]))
    return [
        replace(change, outcome=tested[1] if next(kept) else "no difference") if tested else change
        for change, tested in found
    ]
