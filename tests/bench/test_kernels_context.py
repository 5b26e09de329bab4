"""One kernel that breaks the GPU for the whole process is named in every row after it, and ends no run."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tessera.attention import registry
from tessera.attention.backends.naive import Naive
from tessera.attention.contract import Phase
from tessera.bench.kernels import ceilings
from tessera.bench.kernels import timing as kernel_timing
from tessera.bench.kernels.benchmark import KernelBenchmark
from tessera.bench.kernels.cases import Heads, KernelCase, parse_workload, parts_of
from tessera.bench.kernels.context import Context
from tessera.bench.record import Record


class Wrecks(Naive):
    """Reads where it must not, on its first call or later; afterwards no call of CUDA succeeds."""

    name: ClassVar[str] = "wrecks"
    calls_left: ClassVar[int] = 0
    broken: ClassVar[bool] = False

    def run(self, plan: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        if Wrecks.calls_left == 0:
            Wrecks.broken = True
            cuda()
        Wrecks.calls_left -= 1
        return super().run(plan, q, k, v, sinks)


def cuda() -> None:
    """Any call of CUDA."""
    if Wrecks.broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture(autouse=True)
def broken_by_wrecks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.GEMM_SIZE, "cpu", 64)
    monkeypatch.setitem(ceilings.MOVE_BYTES, "cpu", 2**16)
    monkeypatch.setitem(ceilings.SECONDS, "cpu", 0.0)
    monkeypatch.setattr(kernel_timing, "FLUSH_BYTES", 2**16)
    monkeypatch.setitem(registry.BACKENDS, "wrecks", f"{__name__}:Wrecks")
    monkeypatch.setattr(torch.cuda, "empty_cache", cuda)
    monkeypatch.setattr(torch.cuda, "synchronize", cuda)
    monkeypatch.setattr(Wrecks, "broken", False)


def rows_of(backends: str) -> list[Record]:
    cases = [
        KernelCase(next(parts_of(parse_workload(text), (Phase.DECODE,))), Heads(4, 2, 32), "float32", 16)
        for text in ("2q1s40", "3q1s50")
    ]
    benchmark = KernelBenchmark(cases, backends=backends, device="cpu", repeats=4)
    benchmark._context = Context("cuda")  # all else of the run is on a CPU
    rows = list(benchmark.records())
    assert len(rows) == benchmark.num_records
    return [row for row in rows if row.kind == "kernels"]


@pytest.mark.parametrize("calls", [0, 4])
def test_a_broken_device_is_a_failed_row_each_that_names_who_broke_it(
    calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is prepared, and while it is timed."""
    monkeypatch.setattr(Wrecks, "calls_left", calls)
    before, wrecks, after, *later = rows_of("naive,wrecks,torch_sdpa:flash")
    assert wrecks.reason == "RuntimeError: CUDA error: an illegal memory access was encountered"
    lost = f"not measured: wrecks in decode 2q1s40 broke the device for this process: {wrecks.reason}"
    assert [row.reason for row in (before, after, *later)] == [lost] * 5
    assert all(row.status == "failed" and not row.metrics for row in (before, wrecks, after, *later))


def test_who_fails_and_leaves_the_device_whole_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(Wrecks, "run", plain)
    rows = rows_of("wrecks,naive")
    assert [row.status for row in rows] == ["failed", "ok"] * 2
    assert rows[0].reason == "OutOfMemoryError: tried to allocate 9 GiB"


def test_a_device_that_breaks_while_ceilings_are_measured_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: str) -> tuple[float, list[float]]:
        Wrecks.broken = True
        cuda()
        raise AssertionError

    monkeypatch.setattr(ceilings, "_copy", breaks)
    rows = rows_of("naive")
    assert all("the ceiling of copy in float32 broke the device" in row.reason for row in rows)
