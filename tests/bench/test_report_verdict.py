"""The verdict of a report follows from the rows, and noise is called noise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

import synthetic_rows as rows_of
from synthetic_rows import LAPTOP, kernels, offline, online, quality, row, subject, ttft, where
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
    assert re.search(rf"TPOT unchanged \([^)]*, 5 repeats\), because both decode with {DECODE}", text)


def test_the_same_thing_twice_is_no_difference() -> None:
    text = said(offline({"naive": 3000, "triton": 3000}, noise=0.005, seed=4))
    assert "level offline: no difference that 5 repeats can show" in text and "faster" not in text


def test_of_many_subjects_alike_none_is_found_faster() -> None:
    text = markdown(build(offline({f"b{number}": 3000 for number in range(40)}, noise=0.03, seed=1)))
    assert text.count("| no difference |") == 39 and "b4 and b0 are level offline" in text


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
            "it differs from the reference in 23 of 256 tokens against 3 (sign test, p 8.8e-05)",
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
        r"Kernels, decode: triton has the shortest median in 3 of 3 cases with a rival; against naive it is "
        r"(3\.9|4\.0)\dx",
        text,
    )
    assert "within one run" in text and "within one run" in said(kernels({"naive": 1.0, "triton": 1.001}))


def measured(speeds: dict[str, list[float]], case: str = "rose") -> list[Record]:
    """Offline output tok/s of each backend, repeat by repeat."""
    return [
        row("offline", subject(name), {"workload": case}, {"output_tok_s": value}, repeat=repeat)
        for name, values in speeds.items()
        for repeat, value in enumerate(values)
    ]


NAIVE_SPEEDS = [100.0, 101, 99, 100, 100]


@pytest.mark.parametrize("noisy", [[90.0, 220, 100, 210, 120], [140.0, 141]])
def test_what_is_known_is_said_before_what_is_larger_and_noisy(noisy: list[float]) -> None:
    text = said(measured({"naive": NAIVE_SPEEDS, "triton": [131.0, 129, 130, 130, 131], "flex": noisy}))
    assert text.startswith("triton is 1.30x faster offline than naive")
    assert re.search(r"flex had 1\.[34]\dx of naive, which cannot be told from noise", text)


def test_unchanged_is_said_only_of_what_was_shown_to_be() -> None:
    records = []
    for repeat, (early, pace_of) in enumerate(zip((95, 96, 94), (8, 22, 9))):
        for name, first, pace in (("naive", 160 + repeat, 11 + 0.1 * repeat), ("triton", early, pace_of)):
            metrics = {"ttft_ms_p50": float(first), "tpot_ms_p50": float(pace)}
            records.append(row("online", subject(name, DECODE), {"trace": "p"}, metrics, repeat=repeat))
    text = said(records)
    assert "TPOT not told apart (0.2" in text and "unchanged" not in text and "because" not in text
    assert "not told apart offline" in said(measured({"naive": NAIVE_SPEEDS, "triton": [60.0, 190, 100, 90, 150]}))


def test_a_case_that_not_all_have_does_not_make_a_winner() -> None:
    speeds = {"short": {"triton": 150.0}, "long": {"triton": 900.0, "flex": 800.0}}
    records = []
    for case, others in speeds.items():
        at = {"naive": 100.0, **others}
        records += measured({name: [v * (1 + 0.003 * i) for i in range(5)] for name, v in at.items()}, case)
    text = said(records)
    assert text.startswith("triton is 9.00x") and "geometric mean of 1 of 2 cases" in text
    assert re.search(r"\| flex \| output tok/s \| 8.00x \| \S+ to \S+ \| 5 \| 1 of 2 \|", markdown(build(records)))


def test_a_kernel_alone_in_its_case_has_not_won_it() -> None:
    records = kernels({"naive": 4.0, "triton": 1.0})
    alone = [each for each in records if each.subject.label == "triton" or each.case.get("workload") != "8q1s512"]
    assert "Kernels, decode: triton has the shortest median in 2 of 2 cases with a rival" in said(alone)


def test_of_one_case_no_mean_is_spoken_of() -> None:
    text = said(kernels({"naive": 4.0, "triton": 1.0}, ("8q1s512",)))
    assert "triton has the shortest median in the one case with a rival; against naive it is 4.0" in text
    assert "1 of 1" not in text and "geometric mean" not in text


def test_what_one_label_ran_is_taken_from_all_its_rows() -> None:
    records = offline([(NAIVE, 3000), (FLASH, 4000)])
    other = replace(subject("triton", DECODE), label=FLASH.label, asked={})
    mixed = [
        replace(each, subject=other) if each.repeat and each.subject.label == FLASH.label else each for each in records
    ]
    text = said(mixed)
    assert f"{FLASH.label} did not prefill the same way in all rows" in text and "roven" not in text
    online_rows = online([(NAIVE, 160, 11), (FLASH, 95, 11)])
    mixed = [
        replace(each, subject=other) if each.repeat and each.subject.label == FLASH.label else each
        for each in online_rows
    ]
    text = said(mixed)
    assert "did not prefill the same way" in text and "prefill ran" not in text and "Proven" not in text


def test_the_same_symbols_under_two_names_are_the_same_kernels() -> None:
    other = subject("naive", "flashinfer:fa2", {"flashinfer:fa2": "BatchPrefillWithPagedKVCacheKernel"})
    text = said(offline([(NAIVE, 3000), (other, 4000)]))
    assert f"decode with the same kernels, under the names flashinfer:fa2 and {DECODE}" in text
    assert "differs" not in text


def test_a_token_that_differs_is_not_an_answer_that_is_worse() -> None:
    records = quality({"naive": 0.0, "triton": 1e-9}, {"naive": 1.0, "triton": 15 / 16})
    records = [replace(each, case=each.case | {"prompts": 2, "tokens": 8}) for each in records]
    text = said(records)
    assert "worse than naive; " not in text
    assert "triton differs from the reference in 1 of 16 tokens and naive in 0, too few to tell from chance" in text
    single = [replace(each, conditions=replace(each.conditions, dtype="float32")) for each in records]
    single = [replace(each, metrics=each.metrics | {"kl_mean": 1e-4}) if n else each for n, each in enumerate(single)]
    text = said(single)
    assert "naive in float32 is the reference itself" in text and "KL divergence" not in text
    assert "triton is 0.0001 nats a token from it" in text


def test_the_price_is_of_the_same_model_machine_and_type() -> None:
    worse = quality({"naive": 1e-5, "triton": 1e-2})
    speed = offline({"naive": 3000, "triton": 4000})
    assert "The price" in said(speed + worse)
    for other in (
        [replace(each, conditions=replace(each.conditions, model="other")) for each in worse],
        [replace(each, conditions=replace(each.conditions, dtype="float16")) for each in worse],
        [replace(each, provenance=where(LAPTOP)) for each in worse],
    ):
        assert "The price" not in said(speed + other) and "Quality: triton is worse" in said(speed + other)


def test_another_engine_can_be_the_baseline() -> None:
    vllm = Subject("vllm", engine="vllm", note="another engine")
    theirs = [row("offline", vllm, {"workload": "rose"}, {"output_tok_s": 500.0 + i}, repeat=i) for i in range(5)]
    text = said(measured({"naive": NAIVE_SPEEDS, "triton": [131.0, 129, 130, 130, 131]}) + theirs, "vllm")
    assert text.startswith("vllm is 3.8") and "faster offline than triton" in text


def test_a_baseline_in_several_types_is_recognised() -> None:
    records = []
    for dtype, factor in (("float32", 1.0), ("bfloat16", 2.0)):
        both = offline({"triton": 3000 * factor, "naive": 2500 * factor})
        records += [replace(each, conditions=replace(each.conditions, dtype=dtype)) for each in both]
    assert "than naive [float32]" in said(records) and "than triton [float32]" in said(records, "triton")


def test_a_client_that_was_late_is_said_beside_the_latencies() -> None:
    note = "the client was the bottleneck: it sent a call 19.3 ms late"
    records = online([(NAIVE, 160, 11), (FLASH, 95, 11)])
    late = [
        replace(each, subject=replace(each.subject, note=note), metrics=each.metrics | {"client_lag_ms": 19.3})
        if each.repeat == 1
        else each
        for each in records
    ]
    assert "bottleneck in 8 of 40 online rows: it sent a call up to 19.3 ms late" in said(late)
    assert "bottleneck" not in said(records)
