"""The verdict of a report follows from the rows, and noise is called noise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

import synthetic_rows as rows_of
from synthetic_rows import kernels, offline, online, quality, row, subject, ttft, where
from tessera.bench.record import Record, Subject
from tessera.bench.report.build import build
from tessera.bench.report.page import markdown
from tessera.errors import ConfigError

DECODE = "flashinfer:tensor_cores"
NAIVE, FLASH = subject("naive", DECODE), subject("flash_attn:4", DECODE)


def said(records: Sequence[Record], baseline: str | None = None) -> str:
    return "\n".join(build(records, baseline=baseline).verdict)


def test_a_faster_prefill_is_said_with_its_interval_and_its_reason() -> None:
    text = said(offline([(NAIVE, 3100), (FLASH, 4185)]) + online([(NAIVE, 160, 11), (FLASH, 95, 11)]))
    assert re.search(
        r"^flash_attn:4\+\S+ is 1\.3\dx faster offline than naive\+\S+ \(output tok/s; "
        r"95% interval 1\.3\d to 1\.\d\d, 5 repeats\)",
        text,
    )
    assert f"Both decode with {DECODE}; prefill differs: flash_attn:4 against naive; proven by kernel symbols" in text
    assert "TTFT 1.6" in text and "prefill ran flash_attn:4 against naive" in text
    assert re.search(
        rf"TPOT unchanged \(no difference that 5 repeats can show: [^)]*\), because both decode with {DECODE}", text
    )


def test_the_same_thing_twice_is_no_difference() -> None:
    text = said(offline({"naive": 3000, "triton": 3000}, noise=0.03, seed=4))
    assert "level offline: no difference that 5 repeats can show" in text and "faster" not in text


def test_of_many_subjects_alike_none_is_found_faster() -> None:
    text = markdown(build(offline({f"b{number}": 3000 for number in range(40)}, noise=0.03, seed=1)))
    assert text.count("| no difference |") == 39 and "level offline" in text


def test_one_repeat_is_never_a_finding() -> None:
    text = said(
        offline({"naive": 3000, "triton": 6000}, repeats=1) + online([(NAIVE, 160, 11), (FLASH, 95, 11)], repeats=1)
    )
    assert "1 repeat cannot tell that from noise" in text and "1 repeat, too few to tell from noise" in text
    assert "interval" not in text and "because" not in text


def test_the_same_decode_kernel_with_another_pace_is_not_its_doing() -> None:
    text = said(online([(NAIVE, 160, 14), (FLASH, 95, 11)]))
    assert f"although both decode with {DECODE}, so that the cause lies elsewhere" in text


def test_the_same_name_with_other_symbols_is_not_the_same_kernel() -> None:
    other = replace(subject("naive", DECODE, {DECODE: "SomethingElse"}), label="b")
    text = said(offline([(replace(NAIVE, label="a"), 3000), (other, 4000)]))
    assert "Both decode" not in text and "SomethingElse" in text


def test_kernels_of_an_engine_that_is_not_ours_are_not_claimed() -> None:
    vllm = Subject("vllm", engine="vllm", note="another engine")
    at = where(command="tessera bench offline --repeats 5")
    theirs = [
        row("offline", vllm, {"workload": "rose"}, {"output_tok_s": 4000.0 + i}, repeat=i, at=at) for i in range(5)
    ]
    text = said(offline({"naive": 3000}, at=at) + theirs)
    assert "vllm is 1.3" in text and "Which kernels vllm ran is not known." in text and "proven" not in text


def test_the_best_of_ours_is_named_first_and_another_engine_beside_it() -> None:
    everything = build(rows_of.everything())
    assert (
        everything.verdict[0].startswith("flash_attn:4+")
        and "Another engine, vllm, against flash" in everything.verdict[1]
    )


def test_the_baseline_is_ours_to_choose() -> None:
    records = offline({"naive": 3000, "torch_sdpa": 3500, "triton": 4000})
    assert "than naive" in said(records) and "than torch_sdpa" in said(records, "torch_sdpa")
    with pytest.raises(ConfigError, match="no row with figures has this label"):
        said(records, "trition")


def test_where_the_baseline_is_fastest_it_says_so() -> None:
    assert said(offline({"naive": 4000, "triton": 3000})).startswith("naive is 1.3")


def test_those_level_with_the_fastest_are_named() -> None:
    text = said(offline({"naive": 2000, "triton": 3000, "flash_attn:4": 3005}, noise=0.02))
    assert re.search(r"No difference between (triton and flash_attn:4|flash_attn:4 and triton) can be shown", text)


@pytest.mark.parametrize(
    ("worse", "words"),
    [
        (
            quality({"naive": 2e-4, "triton": 4e-3}),
            "KL divergence from the reference, 0.004, is 20 times that of naive",
        ),
        (
            quality({"naive": 2e-4, "triton": 2e-4}, agreement={"triton": 0.91}),
            "91.0% equal tokens, led with the reference",
        ),
        (quality({"naive": 2e-4, "triton": 2e-4}, score={"triton": 0.60}), "piqa_acc is 0.6 against 0.681"),
    ],
)
def test_a_fast_backend_that_answers_worse_has_its_price_named(worse: list[Record], words: str) -> None:
    speed = offline({"naive": 3000, "triton": 4000})
    text = said(speed + worse)
    assert "The price: triton answers worse" in text and words in text
    assert "price" not in said(speed + quality({"naive": 2e-4, "triton": 4e-4}, score={"triton": 0.675}))


def test_scores_of_the_same_examples_are_compared_in_pairs() -> None:
    right = [1.0] * 60 + [0.0] * 40
    wrong = [0.0] * 8 + [1.0] * 52 + [0.0] * 40  # 8 changed, all for the worse: p = 0.008, but 0.6 +- 0.05 overlaps
    records = []
    for name, scores in (("naive", right), ("triton", wrong)):
        metrics = {"piqa acc": sum(scores) / 100, "piqa acc stderr": 0.049}
        samples = {"piqa acc": scores, "documents piqa acc": [float(n) for n in range(100)]}
        records.append(row("quality", subject(name), {"task": "piqa"}, metrics, samples=samples))
    assert "triton is worse than naive; piqa acc is 0.52 against 0.6" in said(records)


def test_five_answers_that_changed_are_noise_though_all_for_the_worse() -> None:
    records = []
    for name, scores in (("naive", [1.0] * 100), ("triton", [0.0] * 5 + [1.0] * 95)):  # McNemar: p = 0.06
        samples = {"piqa acc": scores, "documents piqa acc": [float(n) for n in range(100)]}
        records.append(
            row("quality", subject(name), {"task": "piqa"}, {"piqa acc": sum(scores) / 100}, samples=samples)
        )
    assert "nothing measured shows triton to answer worse" in said(records)


def test_likelihood_is_compared_window_by_window() -> None:
    windows = {f"nll_window_{n}": [2.0 + n / 10, 3.0 + n / 10] for n in range(6)}
    shifted = {name: [value + 0.02 + 0.001 * n for value in found] for n, (name, found) in enumerate(windows.items())}
    records = [
        row("quality", subject(name), {"text": "book"}, {"perplexity": 12.0}, samples=samples)
        for name, samples in (("naive", windows), ("triton", shifted))
    ]
    assert "log likelihood is 0.022 nats a token worse (paired test over windows" in said(records)


def test_the_network_is_no_rival_of_kernels() -> None:
    text = said(ttft())
    assert "To the first token, against naive: prefix cache is 6.78x faster" in text and "network is 0.5" in text
    assert "network is 1" not in text and "network is 3" not in text


def test_kernels_are_judged_by_phase_within_their_run() -> None:
    text = said(kernels({"naive": 4.0, "triton": 1.0}))
    assert re.search(
        r"Kernels, decode: triton has the shortest median in 3 of 3 cases; against naive it is (3\.9|4\.0)\dx", text
    )
    assert "within one run" in text and "within one run" in said(kernels({"naive": 1.0, "triton": 1.001}))
