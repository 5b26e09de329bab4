"""What a few repeats can show: medians, intervals, and comparisons that call noise noise.

Three repeats that all favour one side happen by chance once in four A/A runs, and a percentile bootstrap of three
values knows only those three, so it is far too sure. An interval here is the wider one of the bootstrap's
(Efron 1979) and Student's t on log ratios, and cells that are judged together are corrected with Holm's method (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["faster", "slower", "no difference", "too few repeats"]
Floats = NDArray[np.float64]

MIN_REPEATS = 3
"""Fewer than these have no interval that deserves the name."""
THRESHOLD = 0.01
"""A ratio nearer to 1 than this is no difference, however sure it is: nobody would feel it."""
CONFIDENCE = 0.95
NUM_RESAMPLES = 1000
NUM_BLOCKS = 5
ROUND_CORRELATION = 0.6
"""Of neighbouring rounds of timings, taken to be as strong as this: clocks and caches remember."""
EQUIVALENCE = 1.05
"""Within this factor either way two are level, where the whole interval lies there."""


@dataclass(frozen=True)
class Interval:
    """An estimate and where the true value lies with `CONFIDENCE`; from 0 or -inf to inf where too few were seen."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """How many times better `a` is than `b`: above 1 is better, whichever way the metric points."""

    ratio: float
    low: float
    high: float
    verdict: Verdict
    num_repeats: int
    """Pairs; where unpaired the smaller side."""
    p_value: float = 1.0
    """Of Student's t (Welch's where unpaired) on log ratios, two-sided, before any correction."""
    threshold: float = THRESHOLD

    @property
    def is_level(self) -> bool:
        """Whether no more than `EQUIVALENCE` lies between the two: more than to have found no difference."""
        return self.verdict == "no difference" and self.low >= 1 / EQUIVALENCE and self.high <= EQUIVALENCE

    @property
    def inverse(self) -> Comparison:
        """The same seen from `b`."""
        turned: dict[Verdict, Verdict] = {"faster": "slower", "slower": "faster"}
        low = 1 / self.high if self.high else math.inf
        high = 1 / self.low if self.low else math.inf
        verdict = turned.get(self.verdict, self.verdict)
        return replace(self, ratio=1 / self.ratio, low=low, high=high, verdict=verdict)


def median(values: Sequence[float]) -> float:
    """The middle one; ValueError for none."""
    return percentile(values, 50)


def percentile(values: Sequence[float], percent: float) -> float:
    """With linear interpolation between neighbours, as numpy does it; ValueError for no values."""
    if not len(values):
        raise ValueError("no values have no percentile")
    return float(np.percentile(np.asarray(values, dtype=float), percent))


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive values; ValueError for others or none."""
    return math.exp(float(_logs(values).mean()))


def block_medians(samples: Sequence[float], num_blocks: int = NUM_BLOCKS) -> list[float]:
    """Medians of consecutive blocks, to stand in for repeats (batch means, Law and Carson 1979).

    Timings of one loop depend on their neighbours; medians of long blocks hardly do. Returns [] where a block would
    have fewer than three samples.
    """
    if len(samples) < 3 * num_blocks:
        return []
    return [float(np.median(block)) for block in np.array_split(np.asarray(samples, dtype=float), num_blocks)]


def compare_rounds(cases: Sequence[Sequence[float]], threshold: float = THRESHOLD) -> Comparison | None:
    """Two that took turns within one run: for each case, how many times better one was in each round.

    Medians of blocks of rounds stand in for repeats, and Student's t is widened by what neighbouring blocks share if
    the noise of rounds is AR(1) with `ROUND_CORRELATION`. None where a case has too few rounds for blocks.
    """
    blocks = [block_medians(ratios) for ratios in cases]
    if not blocks or not all(blocks):
        return None
    logs = np.asarray([_logs(block) for block in blocks]).mean(axis=0)
    error = float(logs.std(ddof=1)) / math.sqrt(NUM_BLOCKS) * _widened(min(map(len, cases)) // NUM_BLOCKS)
    center = float(logs.mean())
    half, p_value = _t_test(center, error, NUM_BLOCKS - 1, CONFIDENCE)
    low, high = math.exp(center - half), math.exp(center + half)
    found = Comparison(math.exp(center), low, high, "no difference", 1, p_value, threshold)
    return replace(found, verdict=_verdict(found, not low <= 1 <= high))


def compare(
    a: Sequence[float],
    b: Sequence[float],
    *,
    paired: bool = True,
    higher_is_better: bool = True,
    threshold: float = THRESHOLD,
    confidence: float = CONFIDENCE,
) -> Comparison:
    """`a` against `b`: repeats of one figure, all positive, in the same order where `paired`.

    Paired, what both share (a machine that warms up) cancels. ValueError for no values, values that are not positive,
    or pairs that do not match.
    """
    sign = 1.0 if higher_is_better else -1.0
    x, y = sign * _logs(a), sign * _logs(b)
    if paired and len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} values are no pairs")
    num = min(len(x), len(y))
    center = float(x.mean() - y.mean())
    if num < MIN_REPEATS:
        return Comparison(math.exp(center), 0.0, math.inf, "too few repeats", num, threshold=threshold)
    half, p_value = _student(x - y, confidence) if paired else _welch(x, y, confidence)
    low, high = _bootstrap(x, y, paired, confidence)
    low, high = min(low, center - half), max(high, center + half)
    found = Comparison(math.exp(center), math.exp(low), math.exp(high), "no difference", num, p_value, threshold)
    return replace(found, verdict=_verdict(found, not low <= 0 <= high))


def judged(family: Sequence[Comparison], alpha: float = 1 - CONFIDENCE) -> list[Comparison]:
    """The comparisons of cells that are read together, each verdict corrected for there being many of them."""
    tested = [index for index, each in enumerate(family) if each.verdict != "too few repeats"]
    kept = dict(zip(tested, holm([family[index].p_value for index in tested], alpha)))
    return [
        replace(each, verdict=_verdict(each, kept[index] and not each.low <= 1 <= each.high)) if index in kept else each
        for index, each in enumerate(family)
    ]


def holm(p_values: Sequence[float], alpha: float = 1 - CONFIDENCE) -> list[bool]:
    """Which hypotheses fall, so that with probability 1 - alpha none of them is true (Holm's step-down method)."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def mcnemar(only_a: int, only_b: int) -> float:
    """The p value of answers that only `a` and only `b` got right, if both were equally good (exact binomial)."""
    from scipy import stats

    total = only_a + only_b
    return 1.0 if total == 0 else float(stats.binomtest(only_a, total, 0.5).pvalue)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[Interval, float]:
    """Mean of a - b, pair by pair, and the p value of there being none (Student's t).

    ValueError for pairs that do not match or none.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} values are no pairs")
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    mean = float(difference.mean())
    if len(difference) < 2:
        return Interval(mean, -math.inf, math.inf), 1.0
    half, p_value = _student(difference, CONFIDENCE)
    return Interval(mean, mean - half, mean + half), p_value


def score_difference(a: float, a_stderr: float, b: float, b_stderr: float) -> tuple[Interval, float]:
    """Of two scores, a - b, of which only standard errors are known, and its p value.

    They are taken as independent, which understates a difference of scores on the same questions.
    """
    from scipy import stats

    error = math.hypot(a_stderr, b_stderr)
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * error
    p_value = float(2 * stats.norm.sf(abs(a - b) / error)) if error else float(a == b)
    return Interval(a - b, a - b - half, a - b + half), p_value


def _verdict(found: Comparison, significant: bool) -> Verdict:
    if not significant or abs(math.log(found.ratio)) < math.log1p(found.threshold):
        return "no difference"
    return "faster" if found.ratio > 1 else "slower"


def _logs(values: Sequence[float]) -> Floats:
    array = np.asarray(values, dtype=float)
    if not array.size or not bool((array > 0).all()) or not bool(np.isfinite(array).all()):
        raise ValueError(f"only positive values have ratios: {list(values)[:5]}")
    logs: Floats = np.log(array)
    return logs


def _student(difference: Floats, confidence: float) -> tuple[float, float]:
    """Half of the interval of the mean, and the p value of 0."""
    num = len(difference)
    error = float(difference.std(ddof=1)) / math.sqrt(num)
    return _t_test(float(difference.mean()), error, num - 1, confidence)


def _welch(x: Floats, y: Floats, confidence: float) -> tuple[float, float]:
    u, v = float(x.var(ddof=1)) / len(x), float(y.var(ddof=1)) / len(y)
    degrees = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1)) if u + v > 0 else 1.0
    return _t_test(float(x.mean() - y.mean()), math.sqrt(u + v), degrees, confidence)


def _t_test(mean: float, error: float, degrees: float, confidence: float) -> tuple[float, float]:
    if error <= 1e-12:  # of a relative figure: the repeats are equal to the last digit
        return 0.0, 1.0 if abs(mean) <= 1e-12 else 0.0
    from scipy import stats

    distribution: Any = stats.t
    half = float(distribution.ppf((1 + confidence) / 2, degrees)) * error
    return half, float(2 * distribution.sf(abs(mean) / error, degrees))


def _widened(length: int) -> float:
    """By what the standard error of `NUM_BLOCKS` blocks of so many AR(1) rounds exceeds that of independent ones."""
    rho, num = ROUND_CORRELATION, NUM_BLOCKS
    variance = length + 2 * sum((length - lag) * rho**lag for lag in range(1, length))
    shared = rho * (1 - rho**length) ** 2 / (1 - rho) ** 2 / variance
    mean = 1 + 2 * sum((1 - lag / num) * shared * rho ** (length * (lag - 1)) for lag in range(1, num))
    return math.sqrt(mean * (num - 1) / (num - mean))


def _bootstrap(x: Floats, y: Floats, paired: bool, confidence: float) -> tuple[float, float]:
    if paired:
        means = (x - y)[_resamples(len(x))].mean(axis=1)
    else:
        means = x[_resamples(len(x))].mean(axis=1) - y[_resamples(len(y), seed=1)].mean(axis=1)
    low, high = np.percentile(means, _tails(confidence))
    return float(low), float(high)


@cache
def _resamples(num: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng([seed, num]).integers(0, num, size=(NUM_RESAMPLES, num))


def _tails(confidence: float) -> list[float]:
    return [50 * (1 - confidence), 50 * (1 + confidence)]
