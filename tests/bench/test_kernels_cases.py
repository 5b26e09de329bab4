"""Workloads are vLLM's, presets are the published grids, and what cannot be honoured is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tessera.attention.contract import Phase, Shape
from tessera.bench.kernels.cases import PRESETS, Group, Heads, KernelCase, parse_heads, parse_workload, parts_of
from tessera.bench.kernels.grid import make_cases
from tessera.bench.kernels.options import KernelOptions
from tessera.errors import ConfigError

CPU = torch.device("cpu")
MODEL = [Shape(9, 3, 64, 0.125, torch.float16, "cpu", window=window) for window in (None, 128)]


def cases(model_named: bool = False, device: torch.device = CPU, **given: Any) -> list[KernelCase]:
    def shapes() -> Sequence[Shape]:
        return MODEL

    return make_cases(KernelOptions(**given), device, shapes, model_named=model_named)


@pytest.mark.parametrize(
    ("text", "groups", "written"),
    [
        ("q2k", [Group(1, 2048, 2048)], "q2k"),
        ("2q2k", [Group(2, 2048, 2048)], "2q2k"),
        ("32q1s4k", [Group(32, 1, 4096)], "32q1s4k"),
        ("2q2k_32q1s4k", [Group(2, 2048, 2048), Group(32, 1, 4096)], "2q2k_32q1s4k"),
        ("1q2048s2048", [Group(1, 2048, 2048)], "q2k"),
        ("q7s1000", [Group(1, 7, 1000)], "q7s1000"),
        ("q1", [Group(1, 1, 1)], "q1"),
        ("q1ks3k", [Group(1, 1024, 3072)], "q1ks3k"),
    ],
)
def test_the_grammar(text: str, groups: list[Group], written: str) -> None:
    parsed = parse_workload(text)
    assert list(parsed) == groups
    assert "_".join(map(str, parsed)) == written


@pytest.mark.parametrize(
    "text", ["", "2", "2q", "q", "8s4k", "q4_", "_q4", "q4s", "q4m", "q4 s8", "q-4", "2q2k__q1", "Q4"]
)
def test_what_is_outside_the_grammar_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a batch") as caught:
        parse_workload(text)
    assert "2q2k_32q1s4k" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("q8s4", "8 new tokens that hold only 4"),
        ("0q4", "within 1 to 65536 sequences"),
        ("q0", "of 1 to 16777216 tokens"),
        ("99999q1s8", "within 1 to 65536 sequences"),
        ("q1s99999k", "of 1 to 16777216 tokens"),
        ("q4_q8s4", "has 'q8s4', which"),
    ],
)
def test_impossible_sizes_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_workload(text)
    assert caught.value.hint


def test_a_step_is_divided_as_the_engine_divides_it() -> None:
    groups = parse_workload("2q8_3q1s9_q1")
    (step,) = parts_of(groups, [Phase.PREFILL, Phase.DECODE])
    assert [(part.phase, part.lens) for part in step] == [
        (Phase.DECODE, ((1, 9), (1, 9), (1, 9), (1, 1))),
        (Phase.PREFILL, ((8, 8), (8, 8))),
    ]
    assert [[part.phase for part in parts] for parts in parts_of(groups, [Phase.DECODE])] == [[Phase.DECODE]]
    assert list(parts_of(groups, [Phase.VISION])) == []
    assert [part.tokens for part in next(parts_of(parse_workload("2q8"), [Phase.VISION]))] == [16]


def test_heads() -> None:
    assert parse_heads("32/8/128, 9/3/64,32/8/128") == [Heads(32, 8, 128), Heads(9, 3, 64)]
    for text in ("32/8", "32-8-128", "32/8/128/1", "a/b/c", "0/1/64", "", "9/2/64", "32/8/99999"):
        with pytest.raises(ConfigError, match="--heads has") as caught:
            parse_heads(text)
        assert caught.value.hint


def test_presets_are_the_published_grids() -> None:
    vit = {(case.workload, case.heads) for case in made("cuda", "vit")}
    assert vit == {
        (f"{batch}q{length}".removeprefix("1"), Heads(16, 16, dim))
        for batch in (1, 2)
        for length in ("1k", "2k", "4k")
        for dim in (64, 72, 80)
    }
    assert {case.phase for case in made("cuda", "vit")} == {"vision"}
    decode = made("cuda", "decode")
    assert len(decode) == 4 * 3 * 3 and {case.phase for case in decode} == {"decode"}
    prefill = made("cuda", "prefill")
    assert {case.phase for case in prefill} == {"prefill", "vision"} and len(prefill) == 8


def made(device: str, preset: Any) -> list[KernelCase]:
    return cases(device=torch.device(device), preset=preset, dtypes="bfloat16")


def test_on_a_cpu_every_preset_is_smaller_and_named_by_its_true_sizes() -> None:
    for preset in ("decode", "prefill", "vit"):
        small, large = (sum(map(tokens_held, made(device, preset))) for device in ("cpu", "cuda"))
        assert small <= large / 4
        names = {entry.workload for entry in PRESETS["cpu", preset]}
        assert {case.workload for case in made("cpu", preset)} == {
            "_".join(map(str, parse_workload(name))) for name in names
        }


@pytest.mark.parametrize("given", [{}, {"preset": "smoke"}, {"preset": "vit"}, {"ladder": True}])
def test_without_a_model_a_preset_has_its_own_heads_and_asks_for_none(given: dict[str, Any]) -> None:
    def no_model() -> Sequence[Shape]:
        raise AssertionError("the model was asked for")

    found = make_cases(KernelOptions(**given), CPU, no_model, model_named=False)
    assert found
    assert given or {case.heads for case in found} == {Heads(9, 3, 64)}


def test_the_ladder_has_sizes_of_both_phases_and_heads_and_workloads_replace_them() -> None:
    assert {case.phase for case in cases(ladder=True)} == {"prefill", "decode"}
    assert {case.phase for case in cases(ladder=True, phases="decode")} == {"decode"}
    assert {str(case.heads) for case in cases(ladder=True, heads="8/8/64")} == {"8/8/64"}
    assert {case.workload for case in cases(ladder=True, workloads="q7", heads="8/8/64")} == {"q7"}
    assert cases(ladder=True, preset="decode") == cases(preset="decode")


def tokens_held(case: KernelCase) -> int:
    return sum(kv_len for part in case.parts for _, kv_len in part.lens)


def test_left_out_heads_windows_and_dtypes_are_the_models() -> None:
    found = cases(workloads="q8")
    assert [(case.heads, case.window, case.dtype) for case in found] == [
        (Heads(9, 3, 64), None, "float16"),
        (Heads(9, 3, 64), 128, "float16"),
    ]


def test_every_option_decides_the_cases() -> None:
    assert {str(case.heads) for case in cases(workloads="q8", heads="4/2/32,8/8/64")} == {"4/2/32", "8/8/64"}
    assert [case.dtype for case in cases(workloads="q8", heads="4/2/32", dtypes="float32,bfloat16")] == [
        "float32",
        "bfloat16",
    ]
    assert {case.page_size for case in cases(workloads="q8", page_size=64)} == {64}
    assert {case.page_size for case in cases(workloads="q8")} == {16}
    assert {case.window for case in cases(workloads="q8", window=5)} == {5}
    assert {case.soft_cap for case in cases(workloads="q8", soft_cap=30.0)} == {30.0}
    assert {case.mode for case in cases(workloads="q8", eager=True)} == {"eager"}
    assert {case.mode for case in cases(workloads="q8", graph=True, device=torch.device("cuda"), dtypes="float16")} == {
        "graph"
    }
    assert {case.phase for case in cases(preset="smoke", phases="vision")} == {"vision"}
    assert {case.phase for case in cases(workloads="q8,2q1s9", phases="prefill,decode")} == {"prefill", "decode"}
    assert {str(case.heads) for case in cases(preset="vit", heads="4/4/32")} == {"4/4/32"}
    assert {str(case.heads) for case in cases(preset="vit", model_named=True)} == {"9/3/64"}
    assert cases() == cases(preset="smoke")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preset": "vit", "workloads": "q4"}, "--preset vit and --workloads"),
        ({"heads": "4/2/32", "model_named": True}, "--heads 4/2/32 and --model"),
        ({"eager": True, "graph": True}, "--eager and --graph exclude"),
        ({"graph": True}, "the device is cpu"),
        ({"dtypes": "int8"}, "--dtypes has 'int8'"),
        ({"phases": "prefil"}, "--phases has 'prefil'"),
        ({"phases": "decode", "preset": "vit"}, "--phases decode leaves nothing"),
        ({"phases": "prefill", "workloads": "q1s4"}, "nothing for prefill: one new token is decode"),
        ({"phases": "vision", "workloads": "q4s9"}, "vision takes sequences without a past"),
        ({"window": 2**31, "preset": "vit"}, "--window 2147483648 means nothing in vision"),
        ({"page_size": 16, "preset": "vit"}, "--page-size 16 means nothing in vision"),
        ({"page_size": 32, "workloads": "q4", "phases": "vision"}, "--page-size 32 means nothing in vision"),
        ({"soft_cap": 4.0, "preset": "vit"}, "--soft-cap 4 means nothing in vision"),
    ],
)
def test_what_cannot_be_honoured_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        cases(**given)
    assert caught.value.hint


def test_a_case_says_what_was_asked_and_nothing_else() -> None:
    (plain, _) = cases(workloads="q8")
    assert plain.fields == {
        "phase": "prefill",
        "workload": "q8",
        "heads": "9/3/64",
        "dtype": "float16",
        "mode": "engine",
        "page_size": 16,
    }
    assert replace(plain, soft_cap=2.0).fields["soft_cap"] == 2.0
