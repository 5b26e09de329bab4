"""The four bars are what their labels say: by proof, by the server's count of cached tokens, and by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tessera.bench.benchmark import Done
from tessera.bench.provenance import provenance
from tessera.bench.record import Conditions, Record, Subject, Value
from tessera.bench.served.load import Reply
from tessera.bench.served.servers import Server
from tessera.bench.served.targets import OwnTarget
from tessera.bench.subjects import Wanted
from tessera.bench.ttft.bars import Bar, Model, bar_in_words, cache_problem, stages_of
from tessera.bench.ttft.benchmark import TtftBenchmark
from tessera.bench.ttft.options import TtftOptions
from tessera.bench.ttft.table import table
from tessera.commands.backends import model_shapes
from tessera.config import EngineConfig
from tessera.errors import TesseraError

COLD, WARM = Bar("triton, no prefix cache"), Bar("triton, prefix cache warm", is_warm=True)


def _reply(cached: int | None) -> Reply:
    return Reply(0, 0.0, 0.0, [0.1], 0.1, 64, 1, "length", cached_tokens=cached)


@pytest.mark.parametrize(("cached", "is_hit"), [(48, True), (16, True), (15, False), (0, False), (None, False)])
def test_the_warm_bar_wants_a_hit_of_every_prompt_and_the_cold_ones_none(cached: int | None, is_hit: bool) -> None:
    assert ("1 of 2 prompts" in cache_problem(WARM, [_reply(48), _reply(cached)])) is not is_hit
    assert bool(cache_problem(COLD, [_reply(0), _reply(cached)])) is bool(cached)


def test_a_model_has_four_bars_and_the_cache_is_off_in_all_but_the_last() -> None:
    _, shapes = model_shapes(EngineConfig())
    stages = stages_of("m", shapes, ["--dtype=float32"], "torch_sdpa")
    labels = [bar.label for stage in stages for bar in stage.bars]
    assert labels == [
        "network",
        "naive, no prefix cache",
        "torch_sdpa, no prefix cache",
        "torch_sdpa, prefix cache warm",
    ]
    off = [stage.target.flags == ["--dtype=float32", "--no-enable-prefix-caching"] for stage in stages]
    assert off == [True, True, False]


def test_left_out_the_fast_bars_are_triton_where_it_can_serve_and_auto_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, shapes = model_shapes(EngineConfig())
    assert stages_of("m", [replace(shape, device_type="cpu") for shape in shapes], [], None)[1].target.label == "auto"
    monkeypatch.setattr("tessera.bench.ttft.bars.wanted_backends", lambda text, _: [Wanted(text, text)])
    assert stages_of("m", shapes, [], None)[1].target.label == "triton"


def test_only_what_ran_triton_is_called_flash_decoding() -> None:
    row = _row("auto, no prefix cache", resolved={"prefill": ["torch_sdpa"], "decode": ["torch_sdpa"]})
    assert bar_in_words(row) == "torch_sdpa, no prefix cache"
    row = _row("auto, prefix cache warm", resolved={"prefill": ["flash_attn:4"], "decode": ["triton"]})
    assert bar_in_words(row) == "flash_attn:4 + triton (Flash-Decoding), prefix cache warm"
    assert bar_in_words(_row("triton, no prefix cache")) == "triton, no prefix cache", "nothing ran"


def _row(label: str, ttft_ms: float = 1.0, model: str = "m", **subject: Any) -> Record:
    case: dict[str, Value] = {"model": model, "prompt_tokens": 64}
    figures = {"ttft_ms": ttft_ms, "cached_prompt_tokens": 96.0}
    return Record(
        "ttft",
        case,
        Subject(label, "server", **subject),
        "ok",
        Conditions(),
        provenance(),
        metrics=figures,
        samples={"ttft_ms": [ttft_ms, ttft_ms]},
    )


def test_the_table_has_medians_a_range_and_bars_to_scale() -> None:
    times = (90.0, 100.0, 300.0)
    slow = [replace(_row("naive, no prefix cache", time), repeat=repeat) for repeat, time in enumerate(times)]
    fast = [_row("network", 25.0), replace(_row("x"), status="failed", metrics={}, samples={}, reason="no luck")]
    heads, first, second, third = table([*slow, *fast])
    assert heads[3] == "TTFT (ms)" and first[2:5] == ("naive, no prefix cache", "100.00", "90.00-300.00")
    assert first[5:7] == ("75%", "3/3"), "96 of 2 x 64 tokens"
    assert (first[7], second[7]) == ("#" * 24, "#" * 6)
    assert third[3] == "-" and third[7] == "failed: no luck"


def test_a_bar_that_is_missing_is_measured_with_all_bars_of_its_model_and_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A comparison that was gone on with must not have bars of two runs."""

    def dead(_self: OwnTarget) -> tuple[Server, Subject]:
        raise TesseraError("no server", "start one")

    monkeypatch.setattr(OwnTarget, "start", dead)
    _, shapes = model_shapes(EngineConfig())
    models = [Model(name, stages_of(name, shapes, [], "torch_sdpa")) for name in ("a", "b")]
    ttft = TtftBenchmark(models, TtftOptions(prompt_lens="8,16", repeats=2))
    rows = list(ttft.records())
    assert len(rows) == ttft.num_records == 2 * 4 * 2 * 2
    assert [row.subject.label for row in rows[:8]] == ["network", "naive, no prefix cache"] * 2 + [
        "torch_sdpa, no prefix cache"
    ] * 2 + ["torch_sdpa, prefix cache warm"] * 2
    done = {Done(row.case_key, row.subject.label, row.repeat) for row in rows}
    missing = next(row for row in rows if row.repeat == 1 and row.case == {"model": "b", "prompt_tokens": 8})
    again = list(ttft.records(done - {Done(missing.case_key, missing.subject.label, 1)}))
    assert {(row.case_key, row.repeat) for row in again} == {(missing.case_key, 1)} and len(again) == 4
    assert len({row.subject.label for row in again}) == 4 and not list(ttft.records(done))
