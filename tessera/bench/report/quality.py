"""What a backend does to the answers: where it is worse than the baseline, and whether that is noise."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

from tessera.bench.record import Value
from tessera.bench.report.metrics import digits, higher_is_better
from tessera.bench.report.rows import Session
from tessera.bench.statistics import CONFIDENCE, MIN_REPEATS, holm, mcnemar, paired_difference, score_difference

KL_FACTOR = 10.0
KL_FLOOR = 1e-5
"""Nats a token: below this a difference of any factor changes nothing."""
AGREEMENT = ("greedy_agreement_led", "greedy_agreement_free", "equal_answers", "equal_tokens_led", "equal_tokens_free")
AGREEMENT_LOSS = 0.02
"""Share of greedy tokens or answers: fewer equal ones than this are worth a word, where they are no chance."""
_UNITS = {"greedy_agreement_led": "tokens", "equal_tokens_led": "tokens", "equal_answers": "answers"}
"""What an agreement counts. Of free answers a token that differs changes all that follow: answers are counted there."""
LIKELIHOOD_LOSS = 0.001
"""Nats a token."""


def losses(session: Session, label: str, baseline: str, dtypes: Collection[str] | None = None) -> list[str]:
    """Each way in which `label` answers worse than `baseline`, as the end of a sentence; [] for none.

    Only in these types, where they are given.
    """
    found = []
    cases = [case for case in session.cases if dtypes is None or session.case_dtypes(case) <= set(dtypes)]
    for case in cases:
        ways = [*_kl(session, label, baseline, case), *_agreement(session, label, baseline, case)]
        found += [way + _about(session, case) for way in [*ways, *_perplexity(session, label, baseline, case)]]
    return found + _scores(session, label, baseline, cases)


def remarks(session: Session, label: str, baseline: str) -> list[str]:
    """Sentences on answers that differ where that shows neither to be worse."""
    found = []
    for case in session.cases:
        for metric, unit in _UNITS.items():
            both = _both(session, label, baseline, case, metric)
            counts = both and disagreements(session.case_of[case], metric, both)
            if counts and counts[0] > counts[1] and not agreement_p_value(counts) < 1 - CONFIDENCE:
                mine, theirs, total = counts
                found.append(
                    f"{label} differs from the reference in {mine} of {total} {unit} and {baseline} in {theirs}, too "
                    f"few to tell from chance{_about(session, case)}."
                )
        if is_reference(session, baseline, case) and (both := _both(session, label, baseline, case, "kl_mean")):
            found.append(f"{label} is {both[0]:.2g} nats a token from it{_about(session, case)}.")
    return found


def is_reference(session: Session, label: str, case: str) -> bool:
    """Whether it is naive in float32, which the others' answers are held against."""
    rows = [row for row in session.rows if (row.subject.label, row.case_key) == (label, case)]
    return bool(rows) and all(
        row.conditions.dtype == "float32"
        and row.subject.resolved
        and {"naive"} == set().union(*row.subject.resolved.values())
        for row in rows
    )


def disagreements(case: Mapping[str, Value], metric: str, shares: tuple[float, float]) -> tuple[int, int, int] | None:
    """Tokens or answers that each of two shares of agreement leaves, and of how many; None where not known."""
    prompts, tokens = case.get("prompts"), case.get("tokens") if _UNITS.get(metric) == "tokens" else 1
    if metric not in _UNITS or not isinstance(prompts, int) or not isinstance(tokens, int):
        return None
    total = prompts * tokens
    return round((1 - shares[0]) * total), round((1 - shares[1]) * total), total


def agreement_p_value(counts: tuple[int, int, int]) -> float:
    """Of two counts of `disagreements`: a sign test as if no token differed in both, which errs towards chance."""
    return mcnemar(counts[0], counts[1])


def _about(session: Session, case: str) -> str:
    about = session.case_text(case)
    return f" ({about})" if about else ""


def mean_of(session: Session, label: str, case: str, metric: str) -> float | None:
    """Over repeats; None where there is none."""
    values = session.values(label, case, metric)
    return fmean(values.values()) if values else None


def _both(session: Session, label: str, baseline: str, case: str, metric: str) -> tuple[float, float] | None:
    a, b = (mean_of(session, each, case, metric) for each in (label, baseline))
    return None if a is None or b is None else (a, b)


def _kl(session: Session, label: str, baseline: str, case: str) -> list[str]:
    both = _both(session, label, baseline, case, "kl_mean")
    if both is None or is_reference(session, baseline, case) or both[0] < KL_FLOOR or both[0] < KL_FACTOR * both[1]:
        return []
    times = f"{digits(both[0] / both[1])} times" if both[1] > 0 else "not 0 as"
    return [f"its KL divergence from the reference, {both[0]:.2g}, is {times} that of {baseline}"]


def _agreement(session: Session, label: str, baseline: str, case: str) -> list[str]:
    found = []
    for metric, unit in _UNITS.items():
        both = _both(session, label, baseline, case, metric)
        counts = both and disagreements(session.case_of[case], metric, both)
        if not both or not counts or both[1] - both[0] <= AGREEMENT_LOSS:
            continue
        mine, theirs, total = counts
        if (p_value := agreement_p_value(counts)) < 1 - CONFIDENCE:
            found.append(
                f"it differs from the reference in {mine} of {total} {unit} against {theirs} "
                f"(sign test, p {p_value:.2g})"
            )
    return found


def _perplexity(session: Session, label: str, baseline: str, case: str) -> list[str]:
    """By a paired test on the windows, where their losses were kept; tokens of one window depend on one another."""
    names = sorted({name for row in session.rows for name in row.samples if name.startswith("nll_window_")})
    a, b = ([session.samples(each, case, name) for name in names] for each in (label, baseline))
    if len(names) < MIN_REPEATS or not all(a) or not all(b):
        return []
    difference, p_value = paired_difference([fmean(window) for window in a], [fmean(window) for window in b])
    if p_value >= 1 - CONFIDENCE or difference.value < LIKELIHOOD_LOSS:
        return []
    return [
        f"its log likelihood is {difference.value:.2g} nats a token worse (paired test over windows, p {p_value:.2g})"
    ]


def _scores(session: Session, label: str, baseline: str, cases: Sequence[str]) -> list[str]:
    """Task scores that are significantly worse, all tasks judged together."""
    tested = []
    for case in cases:
        for metric in session.metrics:
            both, higher = _both(session, label, baseline, case, metric), higher_is_better(metric)
            p_value = _score_p_value(session, label, baseline, case, metric)
            if both and p_value is not None and higher is not None:
                worse = both[0] < both[1] if higher else both[0] > both[1]
                task = metric.removeprefix("lm_eval_")
                tested.append((p_value, worse, f"{task} is {digits(both[0])} against {digits(both[1])}"))
    kept = holm([p_value for p_value, _, _ in tested])
    return [text for (_, worse, text), sure in zip(tested, kept) if sure and worse]


def _score_p_value(session: Session, label: str, baseline: str, case: str, metric: str) -> float | None:
    """Paired over the examples that both answered, else from standard errors; None where neither is known."""
    pairs = _examples(session, label, baseline, case, metric)
    if len(pairs) >= MIN_REPEATS:
        if {score for pair in pairs for score in pair} <= {0.0, 1.0}:
            return mcnemar(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))
        return paired_difference([a for a, _ in pairs], [b for _, b in pairs])[1]
    value = _both(session, label, baseline, case, metric)
    error = next(
        (found for name in stderr_names(metric) if (found := _both(session, label, baseline, case, name))), None
    )
    return score_difference(value[0], error[0], value[1], error[1])[1] if value and error else None


def stderr_names(metric: str) -> tuple[str, str]:
    """What a score's standard error may be called."""
    return f"{metric} stderr", f"{metric}_stderr"


def _examples(session: Session, label: str, baseline: str, case: str, metric: str) -> list[tuple[float, float]]:
    a, b = (
        dict(zip(session.samples(each, case, f"documents {metric}"), session.samples(each, case, metric)))
        for each in (label, baseline)
    )
    return [(score, b[document]) for document, score in a.items() if document in b]
