"""What a few repeats may and may not show."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tessera.bench.statistics import (
    Comparison,
    block_medians,
    compare,
    compare_rounds,
    geometric_mean,
    holm,
    judged,
    mcnemar,
    median,
    paired_difference,
    percentile,
    score_difference,
)


def runs(num_repeats: int, ratio: float, noise: float, num_runs: int, seed: int = 0) -> list[Comparison]:
    """Comparisons of two subjects on a machine that drifts by 5% a repeat, for both alike."""
    rng = np.random.default_rng(seed)
    drift = np.exp(np.cumsum(rng.normal(0, 0.05, (num_runs, num_repeats)), axis=1))
    a = 100 * ratio * drift * np.exp(rng.normal(0, noise, drift.shape))
    b = 100 * drift * np.exp(rng.normal(0, noise, drift.shape))
    return [compare(x, y) for x, y in zip(a.tolist(), b.tolist())]


@pytest.mark.parametrize("num_repeats", [3, 5, 10])
@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_the_same_thing_twice_is_no_difference_in_95_of_100_runs(num_repeats: int, noise: float) -> None:
    found = runs(num_repeats, 1.0, noise, 600)
    assert sum(each.verdict == "no difference" for each in found) / len(found) >= 0.95 - 0.018  # 2 standard errors


@pytest.mark.parametrize(("num_repeats", "found_in"), [(3, 0.6), (5, 0.97), (10, 0.99)])
def test_ten_percent_are_found_under_two_percent_of_noise(num_repeats: int, found_in: float) -> None:
    verdicts = [each.verdict for each in runs(num_repeats, 1.1, 0.02, 300)]
    assert verdicts.count("faster") / len(verdicts) >= found_in and "slower" not in verdicts


def test_a_bootstrap_alone_would_see_differences_that_are_not_there() -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        logs = rng.normal(0, 0.05, 3)
        low, high = np.percentile(logs[rng.integers(0, 3, (500, 3))].mean(axis=1), [2.5, 97.5])
        wrong += not low <= 0 <= high
    assert wrong / 400 > 0.15  # which is why `compare` takes the wider interval


def test_intervals_hold_the_true_ratio_in_95_of_100_runs() -> None:
    found = [each for seed in range(8) for each in runs(4, 1.3, 0.05, 200, seed=seed)]
    assert sum(each.low <= 1.3 <= each.high for each in found) / len(found) >= 0.95 - 0.011  # 2 standard errors


def test_pairing_leaves_out_what_both_share() -> None:
    drift = [1.0, 1.4, 0.7, 1.2, 0.9]
    a, b = [110 * each for each in drift], [100 * each * (1 + 0.001 * i) for i, each in enumerate(drift)]
    assert compare(a, b).verdict == "faster" and compare(a, b, paired=False).verdict == "no difference"


def test_unpaired_is_welch_s_test() -> None:
    a, b = [10.0, 10.4, 9.8, 10.1], [11.0, 12.1, 11.4]
    expected = stats.ttest_ind(np.log(a), np.log(b), equal_var=False).pvalue
    found = compare(a, b, paired=False, higher_is_better=False)
    assert found.p_value == pytest.approx(expected) and found.verdict == "faster" and found.num_repeats == 3


def test_paired_is_student_s_test_and_the_direction_of_the_metric_counts() -> None:
    a, b = [10.0, 11.0, 12.0, 13.0], [20.0, 21.5, 23.0, 26.0]
    found, slow = compare(a, b, higher_is_better=False), compare(a, b)
    assert found.p_value == pytest.approx(stats.ttest_rel(np.log(a), np.log(b)).pvalue)
    assert found.verdict == "faster" and slow.verdict == "slower" and found.ratio == pytest.approx(1 / slow.ratio)
    turned = slow.inverse
    assert turned.verdict == "faster"
    assert turned.ratio == pytest.approx(found.ratio) and turned.low == pytest.approx(found.low)


def test_below_one_percent_is_no_difference_however_sure() -> None:
    a = [100.5, 100.51, 100.49, 100.5]
    assert compare(a, [100.0] * 4).verdict == "no difference"
    assert compare(a, [100.0] * 4, threshold=0.001).verdict == "faster"


@pytest.mark.parametrize("num", [1, 2])
def test_fewer_than_three_are_too_few_whatever_they_say(num: int) -> None:
    found = compare([500.0] * num, [100.0] * num)
    assert found.verdict == "too few repeats" and found.ratio == pytest.approx(5) and found.high == math.inf


def test_equal_values_are_no_difference_and_equal_repeats_a_sure_one() -> None:
    assert compare([3.0] * 3, [3.0] * 3).verdict == "no difference"
    assert compare([3.0] * 3, [2.0] * 3).verdict == "faster"


@pytest.mark.parametrize(
    ("a", "b"), [([], []), ([1.0, 0.0, 2.0], [1.0] * 3), ([1.0] * 3, [1.0] * 4), ([math.inf], [1.0])]
)
def test_what_has_no_ratio_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=r"ratios|pairs"):
        compare(a, b)


def test_holm_is_stricter_than_each_alone_and_milder_than_bonferroni() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert holm([0.01, 0.02]) == [True, True] and holm([]) == []  # Bonferroni would ask 0.025 of both


def test_many_cells_of_noise_are_noise_when_judged_together() -> None:
    alone, together = 0, 0
    for seed in range(20):
        family = runs(5, 1.0, 0.05, 30, seed=seed)
        alone += any(each.verdict != "no difference" for each in family)
        together += any(each.verdict != "no difference" for each in judged(family))
    assert alone > 10 and together <= 4


def test_cells_with_too_few_repeats_stay_so_and_weigh_nothing() -> None:
    few, sure = compare([2.0], [1.0]), compare([2.0, 2.01, 2.02], [1.0, 1.01, 1.0])
    found = judged([few] * 50 + [sure])
    assert found[0] == few and found[-1].verdict == "faster"


def test_percentiles_are_numpy_s() -> None:
    assert percentile([1, 2, 3, 4], 90) == pytest.approx(3.7) and median([5, 1, 3]) == 3
    assert geometric_mean([1, 100]) == pytest.approx(10)
    with pytest.raises(ValueError, match="no percentile"):
        percentile([], 50)


def test_blocks_stand_in_for_repeats_only_where_they_are_long_enough() -> None:
    assert block_medians([1.0] * 14) == [] and block_medians([float(i) for i in range(15)]) == [1, 4, 7, 10, 13]


def rounds(num: int, rho: float, seed: int) -> list[float]:
    """Log timings whose noise remembers: AR(1)."""
    rng = np.random.default_rng(seed)
    found = [float(rng.normal(0, 0.03 / math.sqrt(1 - rho**2)))]
    while len(found) < num:
        found.append(rho * found[-1] + float(rng.normal(0, 0.03)))
    return found


@pytest.mark.parametrize("num_rounds", [15, 30, 100])
def test_the_same_kernel_twice_is_no_difference_though_the_noise_of_its_rounds_remembers(num_rounds: int) -> None:
    pairs = [(rounds(num_rounds, 0.6, 2 * seed), rounds(num_rounds, 0.6, 2 * seed + 1)) for seed in range(400)]
    found = [compare_rounds([[math.exp(x - y) for x, y in zip(*pair)]]) for pair in pairs]
    assert sum(each is not None and each.verdict == "no difference" for each in found) / len(found) >= 0.95 - 0.022


def test_drift_that_both_share_hides_no_kernel_that_is_faster() -> None:
    drift = np.cumsum(np.random.default_rng(0).normal(0, 0.02, 15))
    noise = [np.random.default_rng(seed).normal(0, 0.005, 15) for seed in (1, 2)]
    a, b = np.exp(drift + noise[0]), np.exp(drift + noise[1] + 0.03)
    found = compare_rounds([(b / a).tolist()])
    assert found is not None and found.verdict == "faster" and found.low < 1.03 < found.high
    assert compare_rounds([[1.1] * 14]) is None and compare_rounds([]) is None


def test_level_is_more_than_no_difference_found() -> None:
    sure, wide = compare([100.0, 101.0, 99.5, 100.2], [100.0] * 4), compare([100.0, 190.0, 60.0], [100.0] * 3)
    assert sure.is_level and wide.verdict == "no difference" and not wide.is_level


def test_answers_are_compared_by_those_that_changed() -> None:
    assert mcnemar(0, 0) == 1 and mcnemar(5, 5) == 1
    assert mcnemar(1, 9) == pytest.approx(stats.binomtest(1, 10).pvalue) and mcnemar(0, 12) < 0.001


def test_differences_of_pairs_are_student_s() -> None:
    a, b = [1.0, 2.0, 4.0], [1.1, 2.3, 4.1]
    interval, p_value = paired_difference(a, b)
    assert p_value == pytest.approx(stats.ttest_rel(a, b).pvalue) and interval.low < interval.value < interval.high
    assert paired_difference([1.0], [2.0])[1] == 1
    with pytest.raises(ValueError, match="no pairs"):
        paired_difference([1.0], [])


def test_scores_within_their_errors_are_equal() -> None:
    assert score_difference(0.50, 0.02, 0.52, 0.02)[1] > 0.4 and score_difference(0.50, 0.01, 0.60, 0.01)[1] < 1e-6
    assert score_difference(1, 0, 1, 0)[1] == 1 and score_difference(1, 0, 0.5, 0)[1] == 0
