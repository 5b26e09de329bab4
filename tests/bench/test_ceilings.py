"""What a machine can do is measured in the run, in units that a person can check."""

from __future__ import annotations

import pytest
import torch

from tessera.bench.kernels import ceilings
from tessera.bench.kernels.ceilings import (
    Ceilings,
    Measurement,
    ceiling_records,
    ceilings_of,
    measure_ceilings,
    num_ceilings,
)
from tessera.bench.kernels.tables import tables
from tessera.bench.provenance import provenance


def test_ceilings_are_plausible_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes only ever slow a machine down: the best two of several runs must agree, soon or late."""
    monkeypatch.setitem(ceilings.SECONDS, "cpu", 0.08)
    runs: list[list[Measurement]] = []
    while len(runs) < 2 or (len(runs) < 8 and not all(map(agree, zip(*runs)))):
        runs.append(measure_ceilings("cpu", [torch.float32]))
    assert [each.name for each in runs[0]] == ["read", "copy", "gemm"]
    assert all(map(agree, zip(*runs))), f"the best two of {len(runs)} do not agree within a factor of 2"
    read, copy, gemm = runs[0]
    assert 1e9 < read.per_second < 1e13 and 1e9 < copy.per_second < 1e13
    assert 1e9 < gemm.per_second < 1e16


def agree(same: tuple[Measurement, ...]) -> bool:
    """Whether the best two of these are within a factor of 2."""
    *_, second, best = sorted(each.per_second for each in same)
    return best < 2 * second


def test_the_best_call_counts_and_a_copy_moves_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.MOVE_BYTES, "cpu", 2**20)
    monkeypatch.setitem(ceilings.SECONDS, "cpu", 0.0)
    assert Measurement("gemm", "float32", 2e9, [4.0, 2.0, 3.0]).per_second == 1e12
    assert Measurement("gemm", "float32", 2e9, [2.0]).metric == ("tflop_s", 1.0)
    assert Measurement("read", "float32", 4e9, [1.0]).metric == ("tb_s", 4.0)
    (read, _), (copy, _) = ceilings._read("cpu"), ceilings._copy("cpu")
    assert copy == 2 * read == 2 * 2**20


def test_on_a_cpu_a_dtype_that_is_slower_than_float32_is_not_the_ceiling() -> None:
    slow, fast = Measurement("gemm", "float16", 1e9, [10.0]), Measurement("gemm", "float32", 1e9, [1.0])
    moves = [Measurement("read", "float32", 1e9, [2.0]), Measurement("copy", "float32", 1e9, [1.0])]
    assert ceilings_of([*moves, slow, fast], "float16") == Ceilings(1e12, 1e12)
    assert ceilings_of([*moves, slow], "float16") == Ceilings(1e12, 1e11)
    assert ceilings_of([*moves, slow], "bfloat16") is None, "of another dtype"


def test_each_ceiling_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.GEMM_SIZE, "cpu", 64)
    monkeypatch.setitem(ceilings.MOVE_BYTES, "cpu", 2**20)
    monkeypatch.setitem(ceilings.SECONDS, "cpu", 0.0)
    dtypes = [torch.bfloat16, torch.float16]
    measured = measure_ceilings("cpu", dtypes)
    rows = list(ceiling_records(measured, "cpu", provenance("test")))
    assert len(rows) == num_ceilings("cpu", dtypes) == 5
    assert [row.case["dtype"] for row in rows[2:]] == ["bfloat16", "float16", "float32"]
    assert all(row.kind == "ceiling" and len(row.samples["ms"]) >= 3 for row in rows)
    assert len({row.case_key for row in rows}) == 5


def test_a_ceiling_that_does_not_fit_the_memory_is_a_failed_row_and_ends_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_large(_: str) -> tuple[float, list[float]]:
        raise torch.OutOfMemoryError("tried to allocate 4.00 GiB")

    monkeypatch.setitem(ceilings.GEMM_SIZE, "cpu", 64)
    monkeypatch.setitem(ceilings.MOVE_BYTES, "cpu", 2**20)
    monkeypatch.setitem(ceilings.SECONDS, "cpu", 0.0)
    monkeypatch.setattr(ceilings, "_copy", too_large)
    measured = measure_ceilings("cpu", [torch.float32])
    rows = list(ceiling_records(measured, "cpu", provenance("test")))
    assert [(row.case["ceiling"], row.status) for row in rows] == [("read", "ok"), ("copy", "failed"), ("gemm", "ok")]
    assert rows[1].reason == "OutOfMemoryError: tried to allocate 4.00 GiB" and not rows[1].metrics
    assert ceilings_of(measured, "float32") is not None, "reading is a ceiling too"
    assert "no copy in float32 (OutOfMemoryError: tried" in tables(rows)[0].title
