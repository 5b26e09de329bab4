"""Two result files against each other: what became better, what worse, what cannot be told from noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from tessera.bench.record import Record
from tessera.bench.report.compared import HEADLINES
from tessera.bench.report.metrics import higher_is_better
from tessera.bench.report.quality import AGREEMENT, AGREEMENT_LOSS, KL_FACTOR, KL_FLOOR, stderr_names
from tessera.bench.statistics import CONFIDENCE, Comparison, Verdict, block_medians, compare, judged, score_difference
from tessera.errors import ConfigError

Outcome = Literal["better", "worse", "no difference", "too few repeats", "not judged"]
Key = tuple[str, str, str]
"""Kind, case, label."""

DEFAULT_METRICS = {name for names in HEADLINES.values() for name in names} | {
    "peak_memory_bytes",
    "kl_mean",
    *AGREEMENT,
}
_OUTCOMES: dict[Verdict, Outcome] = {
    "faster": "better",
    "slower": "worse",
    "no difference": "no difference",
    "too few repeats": "too few repeats",
}


@dataclass(frozen=True)
class Change:
    """One metric of one case and label, in both files."""

    kind: str
    case: str
    label: str
    metric: str
    before: float
    """Mean of the repeats of the first file."""
    after: float
    ratio: float | None
    """How many times better the second is; None where nobody knows which way is better or a value is not positive."""
    low: float | None
    high: float | None
    """95% interval; None where it is not known."""
    num_repeats: int
    outcome: Outcome


@dataclass(frozen=True)
class Difference:
    """All of it."""

    changes: list[Change]
    only_before: list[str]
    """Rows that the second file lacks."""
    only_after: list[str]
    paired: bool
    """Whether the runs of the two files took turns, so that their repeats are pairs."""

    @property
    def regressions(self) -> list[Change]:
        """Significant, and worse by more than the threshold."""
        return [change for change in self.changes if change.outcome == "worse"]


def difference(
    before: Sequence[Record],
    after: Sequence[Record],
    *,
    threshold: float = 0.03,
    metrics: Sequence[str] = (),
    across_machines: bool = False,
) -> Difference:
    """Compare what has the same kind, case and label in both; all that is judged is corrected for its number (Holm).

    Repeats are pairs where the runs of the two files took turns (A, B, A, B, ...), as drift then cancels; else Welch's
    test is used, and drift between the two is part of the difference. `metrics` left out are those that a report
    speaks of; `all` is every one. ConfigError for files of other machines, models or types, for no common row and for
    a metric that neither has.
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


def _take_turns(before: Sequence[Record], after: Sequence[Record]) -> Turns | None:
    """None unless each file has several runs and they alternate in time."""
    started = {
        (row.provenance.started, row.provenance.run, side) for side, rows in enumerate((before, after)) for row in rows
    }
    order = sorted(started)
    sides = [side for _, _, side in order]
    alternate = all(x != y for x, y in pairwise(sides))
    runs = {run for _, run, _ in order}
    if len(sides) < 4 or len(sides) % 2 or not alternate or len(runs) != len(order):
        return None
    return {run: index // 2 for index, (_, run, _) in enumerate(order)}


def _change(
    key: Key, name: str, a: Sequence[Record], b: Sequence[Record], turns: Turns | None, threshold: float
) -> tuple[Change, Comparison | None]:
    x, y = ([row.metrics[name] for row in rows if name in row.metrics] for rows in (a, b))
    kind, case = key[0], key[1].removeprefix(f"kind={key[0]} ")
    means = sum(x) / len(x), sum(y) / len(y)
    plain = Change(kind, case, key[2], name, *means, None, None, None, min(len(x), len(y)), "not judged")
    if kind == "quality" and (outcome := _quality_outcome(name, a, b, means)):
        return replace(plain, outcome=outcome), None
    higher = higher_is_better(name)
    if higher is None or min(*x, *y) <= 0:
        return plain, None
    found = _compared(name, a, b, turns, threshold, higher)
    known = found.verdict != "too few repeats"
    low, high = (found.low, found.high) if known else (None, None)
    return replace(plain, ratio=found.ratio, low=low, high=high), found


def _compared(
    name: str, a: Sequence[Record], b: Sequence[Record], turns: Turns | None, threshold: float, higher: bool
) -> Comparison:
    x, y = ([row.metrics[name] for row in rows if name in row.metrics] for rows in (a, b))
    if turns is not None:
        of_a, of_b = (
            {(turns[row.provenance.run], row.repeat): row.metrics[name] for row in rows if name in row.metrics}
            for rows in (a, b)
        )
        if both := sorted(of_a.keys() & of_b.keys()):
            x, y = [of_a[pair] for pair in both], [of_b[pair] for pair in both]
            return compare(y, x, higher_is_better=higher, threshold=threshold)
    if name == "ms_median" and len(x) == len(y) == 1:  # kernels: one run, many timings
        blocks = [block_medians(rows[0].samples.get("ms", [])) for rows in (a, b)]
        x, y = (blocks[0], blocks[1]) if all(blocks) else (x, y)
    return compare(y, x, paired=False, higher_is_better=higher, threshold=threshold)


def _quality_outcome(name: str, a: Sequence[Record], b: Sequence[Record], means: tuple[float, float]) -> Outcome | None:
    """Of what has no chance in it, or has its own standard error; None for what repeats must show."""
    before, after = means
    if name == "kl_mean":
        return _side(
            after >= KL_FACTOR * before and after > KL_FLOOR, before >= KL_FACTOR * after and before > KL_FLOOR
        )
    if name in AGREEMENT:
        return _side(before - after > AGREEMENT_LOSS, after - before > AGREEMENT_LOSS)
    errors = [
        next((row.metrics[each] for each in stderr_names(name) if each in row.metrics), None) for row in (a[-1], b[-1])
    ]
    higher = higher_is_better(name)
    if errors[0] is None or errors[1] is None or higher is None:
        return None
    _, p_value = score_difference(before, errors[0], after, errors[1])
    sure, worse = p_value < 1 - CONFIDENCE, (after < before) is higher
    return _side(sure and worse, sure and not worse)


def _side(worse: bool, better: bool) -> Outcome:
    return "worse" if worse else "better" if better else "no difference"


def _judge(found: Sequence[tuple[Change, Comparison | None]]) -> list[Change]:
    family = iter(judged([comparison for _, comparison in found if comparison]))
    changes = []
    for change, comparison in found:
        if comparison:
            verdict = next(family).verdict
            outcome = _OUTCOMES[verdict]
            change = replace(change, outcome=outcome)
        changes.append(change)
    return changes
