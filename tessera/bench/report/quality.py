"""What a backend does to the answers: where it is worse than the baseline, and whether that is noise."""

from __future__ import annotations

from statistics import fmean

from tessera.bench.report.metrics import digits, higher_is_better, title
from tessera.bench.report.rows import Session
from tessera.bench.statistics import CONFIDENCE, MIN_REPEATS, holm, mcnemar, paired_difference, score_difference

KL_FACTOR = 10.0
KL_FLOOR = 1e-5
"""Nats a token: below this a difference of any factor changes nothing."""
AGREEMENT = ("greedy_agreement_led", "greedy_agreement_free", "equal_answers", "equal_tokens_led", "equal_tokens_free")
AGREEMENT_LOSS = 0.02
"""Share of greedy tokens or answers: fewer equal ones than this are worth a word."""
LIKELIHOOD_LOSS = 0.001
"""Nats a token."""


def losses(session: Session, label: str, baseline: str) -> list[str]:
    """Each way in which `label` answers worse than `baseline`, as the end of a sentence; [] for none."""
    found = []
    for case in session.cases:
        about = session.case_text(case)
        suffix = f" ({about})" if about else ""
        ways = [*_kl(session, label, baseline, case), *_agreement(session, label, baseline, case)]
        found += [way + suffix for way in [*ways, *_perplexity(session, label, baseline, case)]]
    return found + _scores(session, label, baseline)


def mean_of(session: Session, label: str, case: str, metric: str) -> float | None:
    """Over repeats; None where there is none."""
    values = session.values(label, case, metric)
    return fmean(values.values()) if values else None


def _both(session: Session, label: str, baseline: str, case: str, metric: str) -> tuple[float, float] | None:
    a, b = (mean_of(session, each, case, metric) for each in (label, baseline))
    return None if a is None or b is None else (a, b)


def _kl(session: Session, label: str, baseline: str, case: str) -> list[str]:
    both = _both(session, label, baseline, case, "kl_mean")
    if both is None or both[0] < KL_FLOOR or both[0] < KL_FACTOR * both[1]:
        return []
    times = f"{digits(both[0] / both[1])} times" if both[1] > 0 else "not 0 as"
    return [f"its KL divergence from the reference, {both[0]:.2g}, is {times} that of {baseline}"]


def _agreement(session: Session, label: str, baseline: str, case: str) -> list[str]:
    found = []
    for metric in AGREEMENT:
        both = _both(session, label, baseline, case, metric)
        if both and both[1] - both[0] > AGREEMENT_LOSS:
            what = title(metric)
            found.append(f"{both[0]:.1%} {what} with the reference against {both[1]:.1%}")
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


def _scores(session: Session, label: str, baseline: str) -> list[str]:
    """Task scores that are significantly worse, all tasks judged together."""
    tested = []
    for case in session.cases:
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
