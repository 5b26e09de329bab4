"""Kernels are compared fairly: who answers wrongly or is another has no time, everyone else has a proven one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from torch import Tensor

from tessera.attention import registry
from tessera.attention.backends.naive import Naive
from tessera.attention.backends.torch_sdpa import TorchSdpaFlash
from tessera.attention.contract import Claim, Phase, Shape
from tessera.bench.benchmark import Done
from tessera.bench.kernels import ceilings
from tessera.bench.kernels import inputs as kernel_inputs
from tessera.bench.kernels import timing as kernel_timing
from tessera.bench.kernels.benchmark import KernelBenchmark
from tessera.bench.kernels.cases import Heads, KernelCase, parse_workload, parts_of
from tessera.bench.kernels.timing import Cold
from tessera.bench.record import Record
from tessera.errors import ConfigError

HEADS = Heads(4, 2, 32)


class Off(Naive):
    """Right but for a little that is added to every number."""

    name: ClassVar[str] = "off"

    def run(self, plan: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return super().run(plan, q, k, v, sinks) + 1e-2


class OffLater(Naive):
    """Wrong in the last query only."""

    name: ClassVar[str] = "off_later"

    def run(self, plan: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        answer = super().run(plan, q, k, v, sinks)
        answer[-1] = 0
        return answer


class FalseFa3(TorchSdpaFlash):
    """Right, but another's kernel."""

    name: ClassVar[str] = "flash_attn:3"

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        return Claim(must=("FlashAttnFwdSm90",))


class Dies(Naive):
    """Answers twice and raises then."""

    name: ClassVar[str] = "dies"
    calls: ClassVar[int] = 0

    def run(self, plan: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        type(self).calls += 1
        if type(self).calls > 6:
            raise ValueError("no more tiles")
        return super().run(plan, q, k, v, sinks)


class First(Naive):
    """Writes down its name whenever it is called."""

    name: ClassVar[str] = "first"
    called: ClassVar[list[str]] = []

    def run(self, plan: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        First.called.append(self.name)
        return super().run(plan, q, k, v, sinks)


class Second(First):
    name: ClassVar[str] = "second"


@pytest.fixture
def plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (Off, OffLater, FalseFa3, Dies, First, Second):
        monkeypatch.setitem(registry.BACKENDS, backend.name, f"{__name__}:{backend.__name__}")
    Dies.calls = 0
    First.called.clear()


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings have a test of their own."""
    monkeypatch.setitem(ceilings.GEMM_SIZE, "cpu", 128)
    monkeypatch.setitem(ceilings.MOVE_BYTES, "cpu", 2**20)
    monkeypatch.setitem(ceilings.SECONDS, "cpu", 0.0)
    monkeypatch.setattr(kernel_timing, "FLUSH_BYTES", 2**22)


def case(workload: str, *phases: Phase, dtype: str = "float32", **settings: Any) -> KernelCase:
    parts = next(parts_of(parse_workload(workload), phases or (Phase.PREFILL, Phase.DECODE)))
    page_size = None if Phase.VISION in phases else 16
    return KernelCase(parts, HEADS, dtype, page_size, **settings)


def rows_of(cases: list[KernelCase], backends: str, **settings: Any) -> list[Record]:
    benchmark = KernelBenchmark(cases, backends=backends, device="cpu", **({"repeats": 3} | settings))
    records = list(benchmark.records())
    assert len(records) == benchmark.num_records
    assert {row.kind for row in records[:3]} == {"ceiling"}
    return [row for row in records if row.kind == "kernels"]


@pytest.mark.usefixtures("plug_ins")
@pytest.mark.parametrize("workload", ["2q40_q5s90", "3q1s70"])
def test_a_backend_that_adds_a_hundredth_is_a_failed_row_and_has_no_time(workload: str) -> None:
    off, naive = rows_of([case(workload)], "off,naive")
    assert off.status == "failed"
    assert off.reason.startswith("off answers wrongly in ") and "allowed are 6e-05" in off.reason
    assert not off.metrics and not off.samples and not off.subject.proofs
    assert naive.status == "ok"


@pytest.mark.usefixtures("plug_ins")
def test_in_bfloat16_a_long_context_is_held_to_its_own_size() -> None:
    row, *_ = rows_of([case("2q1s700", dtype="bfloat16")], "off")
    assert row.status == "failed" and "root mean squares" in row.reason


@pytest.mark.usefixtures("plug_ins")
def test_the_last_query_of_a_case_too_large_to_check_whole_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_inputs, "CHECK_SCORES", 10)
    naive, off = rows_of([case("2q100")], "naive,off_later")
    assert naive.metrics["checked_tokens"] == 2 * 3 * 16
    assert off.status == "failed" and off.reason.startswith("off_later answers wrongly")


@pytest.mark.usefixtures("plug_ins")
def test_a_backend_that_runs_anothers_kernel_is_a_failed_row() -> None:
    fa3, flash = rows_of([case("2q40")], "flash_attn:3,torch_sdpa:flash")
    assert fa3.status == "failed" and "flash_attn:3 is not what attends in prefill" in fa3.reason
    assert not fa3.metrics
    assert flash.status == "ok"
    assert [proof.backend for proof in flash.subject.proofs] == ["torch_sdpa:flash"]
    assert "flash_attention_for_cpu" in flash.subject.proofs[0].symbols[0].name


@pytest.mark.usefixtures("plug_ins")
def test_one_that_fails_while_it_is_timed_ends_nobody_else_and_keeps_no_time() -> None:
    dies, naive = rows_of([case("2q1s40")], "dies,naive", repeats=9)
    assert (dies.status, dies.reason, dies.metrics) == ("failed", "ValueError: no more tiles", {})
    assert len(naive.samples["ms"]) == 9


@pytest.mark.usefixtures("plug_ins")
def test_backends_are_timed_in_turn_and_nobody_always_follows_the_same() -> None:
    rows_of([case("2q1s40")], "first,second", repeats=3)
    assert First.called[-8:-2] == ["first", "second", "second", "first", "first", "second"]
    assert First.called[-2:] == ["first", "second"], "answers are checked once more"
    assert set(First.called[:2]) == {"first"}, "everyone is checked and proven before anyone is timed"


def test_every_timed_call_finds_cold_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    whole = Cold.wall_ms

    def empty(_: Cold) -> None:
        order.append("flush")

    def watched(self: Cold, call: Callable[[], object]) -> float:
        def noted() -> object:
            order.append("call")
            return call()

        return whole(self, noted)

    monkeypatch.setattr(Cold, "empty", empty)
    monkeypatch.setattr(Cold, "wall_ms", watched)
    rows_of([case("2q1s40")], "naive", repeats=3)
    assert order == ["flush", "call"] * 3


def test_a_row_has_all_its_repeats_and_figures_that_fit_one_another() -> None:
    (row,) = rows_of([case("2q64")], "naive", repeats=5)
    metrics = row.metrics
    assert len(row.samples["ms"]) == 5 and sorted(row.samples["ms"])[2] == metrics["ms_median"]
    seconds = metrics["ms_median"] / 1000
    assert metrics["tok_s"] * seconds == pytest.approx(128)
    assert metrics["tflop_s"] * 1e12 * seconds == pytest.approx(4 * 32 * 4 * 2 * (64 * 65 // 2))
    assert metrics["tb_s"] * 1e12 * seconds == pytest.approx(4 * 32 * 2 * 2 * (64 * 4 + 64 * 2))
    settings = row.conditions.settings
    shares = {
        "compute": metrics["tflop_s"] / float(settings["ceiling_tflop_s"] or 0),
        "bandwidth": metrics["tb_s"] / float(settings["ceiling_tb_s"] or 0),
    }
    assert metrics["ceiling_share"] == pytest.approx(max(shares.values()))
    assert settings["bound"] == max(shares, key=shares.__getitem__)
    assert row.conditions.cache == "cold" and settings["timed_as"] == "eager"


def test_a_step_of_both_phases_is_the_sum_of_its_parts_each_by_its_backend() -> None:
    row, same = rows_of([case("q30_3q1s50")], "torch_sdpa:math+naive,naive")
    assert row.case["phase"] == "decode+prefill" and row.case["workload"] == "3q1s50_q30"
    assert row.subject.label == "torch_sdpa:math+naive" and same.subject.label == "naive"
    assert {proof.phase: proof.backend for proof in row.subject.proofs} == {
        "decode": "naive",
        "prefill": "torch_sdpa:math",
    }
    parts = zip(row.samples["decode_eager_ms"], row.samples["prefill_eager_ms"])
    assert row.samples["ms"] == pytest.approx([sum(part) for part in parts])


def test_a_pair_runs_in_a_case_of_one_phase_as_that_phases_backend() -> None:
    cases = [case("3q1s50"), case("q30")]
    assert [row.subject.label for row in rows_of(cases, "torch_sdpa:math+naive")] == ["naive", "torch_sdpa:math"]


def test_vision_is_timed_without_pages_and_sees_both_ways() -> None:
    (row,) = rows_of([case("2q48", Phase.VISION)], "naive")
    assert row.status == "ok" and "page_size" not in row.case
    assert row.metrics["tflop_s"] * row.metrics["ms_median"] * 1e9 == pytest.approx(4 * 32 * 4 * 2 * 48 * 48)


def test_windows_and_soft_caps_are_asked_of_backends_and_counted() -> None:
    plain, windowed = rows_of([case("q64"), case("q64", window=8, soft_cap=5.0)], "naive")
    assert windowed.case["window"] == 8 and windowed.case["soft_cap"] == 5.0 and windowed.status == "ok"
    flops = [row.metrics["tflop_s"] * row.metrics["ms_median"] for row in (plain, windowed)]
    assert flops[1] == pytest.approx(flops[0] * (36 + 56 * 8) / (64 * 65 // 2))
    (refused,) = rows_of([case("q64", soft_cap=5.0)], "torch_sdpa:flash")
    assert refused.status == "unavailable" and "no soft cap" in refused.reason


def test_named_and_all_have_rows_that_say_why_not_and_usable_has_none() -> None:
    usable = KernelBenchmark([case("q1s20"), case("q20_q1s20")], backends="usable", device="cpu")
    for _, found in usable._program:
        assert {"naive", "torch_sdpa:flash"} <= {entrant.label for entrant in found}
        assert "auto" not in {entrant.label for entrant in found}
        assert not any(entrant.reasons for entrant in found)
    (named,) = rows_of([case("q1s20")], "flashinfer:fa3")
    assert (named.status, named.reason) == ("unavailable", "decode: no decode kernel")
    benchmark = KernelBenchmark([case("q1s20")], backends="all", device="cpu")
    labels = {entrant.label: entrant.reasons for _, found in benchmark._program for entrant in found}
    assert labels["triton"] and not labels["naive"]
    assert "flashinfer:fa3" not in labels and "auto" not in labels


@pytest.mark.parametrize(
    ("backends", "said"),
    [
        ("auto", "auto is no attention backend"),
        ("naive,auto", "auto is no attention backend"),
        ("auto+naive", "auto is no attention backend"),
        ("naive,naive", "compared with itself"),
        ("nave", "unknown attention backend 'nave'"),
        ("flash_attn", "is a library with variants"),
        ("naive,", "unknown attention backend ''"),
    ],
)
def test_auto_and_false_names_are_refused_with_a_hint(backends: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        KernelBenchmark([case("q4")], backends=backends, device="cpu")
    assert caught.value.hint


def test_a_case_larger_than_the_memory_is_a_failed_row_with_both_numbers() -> None:
    big, small = rows_of([case("60000q1s16384k"), case("q8")], "naive")
    assert big.status == "failed" and big.reason.startswith("MemoryError: the case needs ")
    assert "GiB of what is free may be taken" in big.reason
    assert small.status == "ok"


def test_rows_that_are_done_are_left_out() -> None:
    cases = [case("q8"), case("q1s9")]
    first = list(KernelBenchmark(cases, backends="naive", device="cpu", repeats=1).records())
    done = {Done(row.case_key, row.subject.label, row.repeat) for row in first}
    benchmark = KernelBenchmark(cases, backends="naive", device="cpu", repeats=1)
    assert list(benchmark.records(done)) == []
    left = done - {Done(first[-1].case_key, "naive", 0)}
    assert [row.case["workload"] for row in benchmark.records(left)] == ["q1s9"]
