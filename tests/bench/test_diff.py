"""Two runs against each other: regressions are found, noise is not, and what must not be compared is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthetic_rows import LAPTOP, kernels, lost, offline, online, quality, row, subject, where
from tessera.bench.diff import Difference, difference
from tessera.bench.record import Record, append
from tessera.bench.report.metrics import higher_is_better
from tessera.cli import main


def run(tmp_path: Path, a: Sequence[Record], b: Sequence[Record], *words: str) -> int:
    for name, records in (("a.jsonl", a), ("b.jsonl", b)):
        (tmp_path / name).unlink(missing_ok=True)
        append(tmp_path / name, records)
        (tmp_path / name).touch()
    return main(["bench", "diff", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), *words])


def outcomes(found: Difference) -> dict[str, str]:
    return {change.metric: change.outcome for change in found.changes}


def runs_of(speeds: dict[str, float], name: str, runs: int = 4, **more: Any) -> list[Record]:
    """Several runs of one version, five repeats each."""
    return [
        each
        for number in range(runs)
        for each in offline(speeds, at=where(run=f"{name}{number}"), seed=10 * number + len(name), **more)
    ]


def first(speed: float = 4000, runs: int = 4, **more: Any) -> list[Record]:
    return runs_of({"naive": 3000, "triton": speed}, "a", runs, **more)


def again(speed: float, runs: int = 4, **more: Any) -> list[Record]:
    return runs_of({"naive": 3000, "triton": speed}, "bb", runs, **more)


def test_a_regression_is_exit_code_1_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, first(), again(3500)) == 1
    text = capsys.readouterr().out
    worst = text.splitlines()[1].split()
    assert "triton" in worst and worst[-1] == "worse" and "1 regression beyond 3.0%" in text and "unpaired" in text


def test_the_same_code_twice_and_an_improvement_are_exit_code_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, first(), again(4000)) == 0
    assert "no regression" in capsys.readouterr().out
    assert run(tmp_path, first(), again(5000)) == 0
    assert "better" in capsys.readouterr().out.split()


def test_what_is_worse_by_less_than_the_threshold_is_no_regression(tmp_path: Path) -> None:
    a, b = first(noise=0.001), again(3600)
    assert run(tmp_path, a, b) == 1 and run(tmp_path, a, b, "--threshold", "0.2") == 0


def test_one_run_each_cannot_tell_a_run_from_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, first(4000, 1), again(1000, 1)) == 3
    assert "one run each: cannot tell a run from the code" in capsys.readouterr().out
    assert run(tmp_path, first(4000, 2), again(1000, 2)) == 3
    assert "fewer than 3 runs a side" in capsys.readouterr().out
    assert run(tmp_path, first(4000, 3), again(1000, 3)) == 1


def test_where_nothing_could_be_judged_is_neither_a_pass_nor_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, first(4000, 1), again(4000, 1)) == 3
    text = capsys.readouterr().out
    assert text.endswith("\nnothing could be judged\n\nhint: three runs a side give a verdict\n")
    assert run(tmp_path, first(4000, 1), again(4000, 1), "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert found["judged"] == 0 and found["changes"]
    a = [replace(each, metrics=each.metrics | {"zeal": 1.0}) for each in first()]
    assert run(tmp_path, a, a, "--metric", "zeal") == 3
    assert "hint: name metrics that have a better side with --metric" in capsys.readouterr().out


def test_a_verdict_on_a_part_says_on_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def some(name: str) -> list[Record]:
        return [*runs_of({"naive": 3000}, name), *runs_of({"triton": 4000}, name, 1)]

    assert run(tmp_path, some("a"), some("bb"), "--metric", "output_tok_s") == 0
    assert "no regression beyond 3.0% in the 1 of 2 that could be judged; compared" in capsys.readouterr().out
    assert run(tmp_path, first(), again(4000), "--metric", "output_tok_s") == 0
    assert "no regression beyond 3.0%; compared" in capsys.readouterr().out


def test_runs_that_lie_apart_are_no_difference_of_the_code() -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(60):
        sides = []
        for name in "ab":
            pace = [4000 * float(np.exp(rng.normal(0, 0.05))) for _ in range(3)]
            sides.append(
                [
                    row("offline", subject("triton"), {}, {"output_tok_s": value * (1 + 0.002 * i)}, repeat=i, at=at)
                    for number, value in enumerate(pace)
                    for at in [where(run=f"{name}{number}")]
                    for i in range(5)
                ]
            )
        wrong += outcomes(difference(*sides))["output_tok_s"] in ("better", "worse")
    assert wrong <= 6  # repeats taken as if they were runs would find more than 20


def test_a_run_that_was_resumed_counts_once() -> None:
    a = first(runs=3)
    more = [replace(each, provenance=replace(each.provenance, run="x", continues="a0")) for each in a]
    assert all(each.num_runs == 3 for each in difference([*a, *more], again(4000)).changes)


def test_what_the_command_promises_of_runs_is_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "diff", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "at least three runs a side" in text and "3: nothing could be judged" in text


def test_runs_that_took_turns_are_compared_in_pairs() -> None:
    def at(day: int) -> list[Record]:
        place = replace(where(run=f"r{day}"), started=f"2026-11-{day:02}T12:00:00+00:00")
        speed = 4000 * 1.2**day * (1.06 if day % 2 else 1.0)  # each day is faster, and B besides
        return offline({"triton": speed}, 1, noise=0.002, at=place, seed=day)

    a, b = [*at(2), *at(4), *at(6), *at(8)], [*at(3), *at(5), *at(7), *at(9)]
    turned = difference(a, b, metrics=["output_tok_s"])
    assert turned.paired and turned.changes[0].num_runs == 4 and turned.changes[0].outcome == "better"
    sorted_out = difference(a, [replace(each, provenance=replace(each.provenance, run="one")) for each in b])
    assert not sorted_out.paired and outcomes(sorted_out)["output_tok_s"] == "too few runs"


def test_kernels_are_compared_run_by_run() -> None:
    def of(name: str, triton: float, runs: int) -> list[Record]:
        found = kernels({"naive": 4.0, "triton": triton})
        return [
            replace(
                each,
                provenance=where(run=f"{name}{n}"),
                metrics={metric: value * (1 + 0.001 * n) for metric, value in each.metrics.items()},
            )
            for n in range(runs)
            for each in found
        ]

    found = {(change.label, change.outcome) for change in difference(of("a", 1.0, 3), of("b", 1.3, 3)).changes}
    assert found == {("naive", "no difference"), ("triton", "worse")}
    alone = difference(of("a", 1.0, 1), of("b", 1.3, 1)).changes
    assert {change.outcome for change in alone} == {"too few runs"}


@pytest.mark.parametrize(
    ("after", "outcome"),
    [
        (quality({"triton": 4e-3}), {"kl_mean": "worse"}),
        (quality({"triton": 3e-4}), {"kl_mean": "no difference"}),
        (quality({"triton": 2e-4}, agreement={"triton": 0.9}), {"greedy_agreement_led": "worse"}),
        (quality({"triton": 2e-4}, score={"triton": 0.6}), {"lm_eval_piqa_acc": "worse"}),
        (quality({"triton": 2e-4}, score={"triton": 0.69}), {"lm_eval_piqa_acc": "no difference"}),
        (quality({"triton": 2e-4}, agreement={"triton": 0.965}), {"greedy_agreement_led": "no difference"}),
    ],
)
def test_answers_have_no_chance_in_them_and_are_judged_from_one_run(
    after: list[Record], outcome: dict[str, str]
) -> None:
    found = outcomes(difference(quality({"triton": 2e-4}), after))
    assert found.items() >= outcome.items()


def test_many_scores_are_corrected_for_their_number() -> None:
    def of(score: float, others: int) -> list[Record]:
        names = {f"b{number}": 0.681 for number in range(others)}
        return quality(dict.fromkeys(["triton", *names], 2e-4), score={"triton": score, **names})

    alone, among = (difference(of(0.681, n), of(0.64, n), metrics=["lm_eval_piqa_acc"]) for n in (0, 30))
    assert len(alone.regressions) == 1 and not among.regressions  # p = 0.008


def test_many_cells_of_noise_make_no_regression() -> None:
    paces = [(subject("naive"), 160.0, 11.0), (subject("triton"), 95.0, 11.0)]
    a, b = list[Record](), list[Record]()
    for each in online(paces, repeats=3):
        for side, name, factor in ((a, "a", 1.0), (b, "b", 1.001 + 0.0005 * each.repeat)):
            at = where(run=f"{name}{each.repeat}")  # a run for each repeat
            metrics = {metric: value * factor for metric, value in each.metrics.items()}
            side.append(replace(each, repeat=0, provenance=at, metrics=metrics))
    found = difference(a, b, metrics=["all"])
    assert not found.regressions and {change.num_runs for change in found.changes} == {3}


def test_many_subjects_of_noise_make_no_regression() -> None:
    speeds = dict.fromkeys((f"b{number}" for number in range(40)), 3000.0)
    a, b = runs_of(speeds, "a", 5, noise=0.08), runs_of(speeds, "bb", 5, noise=0.08)
    found = difference(a, b, metrics=["output_tok_s"])
    assert len(found.changes) == 40 and set(outcomes(found).values()) == {"no difference"}
    alone = [each for each in found.changes if each.low is not None and each.high is not None]
    assert any(each.low > 1 or each.high < 1 for each in alone if each.low and each.high)


def test_a_metric_is_judged_by_its_name_and_never_by_guess() -> None:
    a = [
        row("offline", subject("triton"), {}, {"zeal": 1.0 + i / 100, "output_tok_s": 10.0}, at=where(run=f"r{i}"))
        for i in range(4)
    ]
    b = [replace(each, metrics=each.metrics | {"zeal": 9.0}) for each in a]
    assert outcomes(difference(a, b)) == {"output_tok_s": "no difference"}
    assert outcomes(difference(a, b, metrics=["zeal"])) == {"zeal": "not judged"}
    assert outcomes(difference(a, b, metrics=["all"])) == {"zeal": "not judged", "output_tok_s": "no difference"}


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("tok_s", True), ("output_tok_s", True), ("goodput_share", True), ("ceiling_share", True), ("tflop_s", True),
        ("lm_eval_piqa_acc", True), ("piqa acc_norm,none", True), ("greedy_agreement_led", True),
        ("ttft_ms_p99", False), ("ms_median", False), ("ttft_ms", False), ("seconds", False), ("kl_mean", False),
        ("peak_memory_bytes", False), ("perplexity", False), ("wikitext word_perplexity", False),
        ("ms_std", None), ("piqa acc stderr", None), ("network_ms", None), ("client_lag_ms", None), ("wobble", None),
        ("perplexity_reference", None), ("warmup_seconds", None), ("cached_prompt_share", None), ("nll_p_value", None),
    ],
)  # fmt: skip
def test_which_way_is_better(metric: str, better: bool | None) -> None:
    assert higher_is_better(metric) is better


def test_rows_that_one_file_lacks_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = offline({"naive": 3000, "triton": 4000}), offline({"naive": 3000, "flash_attn:4": 5000})
    assert run(tmp_path, a, b) == 3
    text = capsys.readouterr().out
    assert "only in the first file: workload=rose triton (offline)" in text
    assert "only in the second file: workload=rose flash_attn:4 (offline)" in text


def test_json_has_every_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, offline({"triton": 4000}, 1), again(3000), "--json", "--metric", "output_tok_s") == 3
    found = json.loads(capsys.readouterr().out)
    (change,) = found["changes"]
    assert (
        change["outcome"] == "too few runs"
        and change["low"] is None
        and change["ratio"] == pytest.approx(0.75, abs=0.05)
    )
    assert found["regressions"] == 0 and found["only_after"] == ["workload=rose naive (offline)"]


def test_another_machine_model_or_type_is_refused_unless_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = runs_of({"triton": 4000}, "a")
    others = {
        "machine": [
            replace(each, provenance=replace(each.provenance, machine=LAPTOP))
            for each in runs_of({"triton": 2000}, "bb")
        ],
        "model": [replace(each, conditions=replace(each.conditions, model="other")) for each in a],
        "dtype": [replace(each, conditions=replace(each.conditions, dtype="float32")) for each in a],
    }
    for what, b in others.items():
        assert run(tmp_path, a, b) == 2
        assert f"the files differ in {what}: " in (found := capsys.readouterr().err) and "--across-machines" in found
        assert run(tmp_path, a, b, "--across-machines") == (1 if what == "machine" else 0)
        capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--threshold", "1.5"], "--threshold 1.5 is not between 0 and 1"),
        (["--threshold", "-1"], "--threshold -1 is not between 0 and 1"),
        (["--threshold", "nan"], "--threshold nan is not between 0 and 1"),
        (["--metric", "speed"], "--metric speed: no row has it"),
    ],
)
def test_wrong_usage_is_exit_code_2_with_a_hint(
    words: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, offline({"triton": 4000}), again(4000), *words) == 2
    found = capsys.readouterr().err
    assert problem in found and "hint: " in found


def test_files_with_nothing_in_common_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for b in ([], offline({"naive": 1}), [lost("offline", subject("triton"), "out of memory")]):
        assert run(tmp_path, offline({"triton": 4000}), b) == 2
        assert "in common" in capsys.readouterr().err
