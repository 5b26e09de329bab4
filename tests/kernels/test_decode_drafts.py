"""Decode of several new tokens a sequence, as drafts are checked in: rows of a tile are queries and heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tessera.attention.backends.naive import Naive
from tessera.attention.backends.triton import Triton
from tessera.attention.backends.triton_decode import (
    MAX_QUERIES,
    Decode,
    TritonFlashDecoding,
    TritonFlashDecodingPP,
    TritonPaged,
)
from tessera.attention.backends.triton_options import Options
from tessera.attention.checks import NotClaimed, Subject, workload
from tessera.attention.contract import Phase, Shape
from tessera.attention.verify import verify
from tessera.attention.workloads import DRAFTS, TOLERANCE, Workload, make_case
from triton_interpreter import (
    DEVICE,
    INTERPRETED,
    MISSING,
    check_in_interpreter,
    every_dtype,
    needs_cuda,
    needs_kernels,
    outside_interpreter,
)

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
FINE = Options(0, 32, 4, 2, programs_per_sm=2, min_split=64, balanced_per_sm=4)
"""Cuts short sequences too."""
RUNS = replace(FINE, balanced_per_sm=9, runs=True)
by_length_and_in_runs = pytest.mark.parametrize("options", [FINE, RUNS], ids=["by length", "in runs"])


def make_shape(q_heads: int = 6, kv_heads: int = 2, head_dim: int = 32, dtype: torch.dtype = torch.float16) -> Shape:
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
    return Shape(q_heads, kv_heads, head_dim, head_dim**-0.5, dtype, DEVICE, capability, 16)


@pytest.mark.timeout(600)
@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@every_dtype
@pytest.mark.parametrize("name", DRAFTS)
def test_drafts_equal_the_oracle(dtype: torch.dtype, name: str) -> None:
    for backend in (Triton, TritonPaged, TritonFlashDecoding) if dtype == torch.float16 else (Triton,):
        case = make_case(Phase.DECODE, DRAFTS[name], make_shape(dtype=dtype))
        assert case.problems(case.answer(backend)) == []


@needs_kernels
@every_dtype
@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (16, 1), (40, 1), (4, 4)])
def test_rows_that_fill_more_than_a_tile_equal_the_oracle(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    asked = Workload(((5, 90), (1, 33), (3, 3), (5, 0)), sinks=True)
    for balanced, options in ((True, FINE), (False, FINE), (True, RUNS)):
        case = make_case(Phase.DECODE, asked, make_shape(*heads, dtype=dtype))
        decode = Decode(case.shape, balanced=balanced, options=options)
        plan = decode.plan(case.batch)
        out = decode.run(plan, case.q, case.k, case.v, case.sinks)
        assert case.problems(out) == []
        assert not out[9:].any()


@needs_kernels
@by_length_and_in_runs
def test_one_plan_serves_any_lengths_and_any_fewer_drafts(options: Options) -> None:
    for window in (None, 150):
        shape = replace(make_shape(), window=window)
        longest = make_case(Phase.DECODE, Workload(((5, 300),) * 4, window=window), shape)
        decode = Decode(shape, options=options)
        plan = decode.plan(longest.batch)
        assert plan.shares.balanced and plan.shares.runs is options.runs
        for lens in (((5, 300), (1, 1), (3, 64), (5, 0)), ((1, 5), (1, 300), (1, 0), (1, 0))):
            case = make_case(Phase.DECODE, Workload(lens, window=window), shape)
            decode.workspace.part_out.fill_(torch.nan)
            out = decode.run(replace(plan, batch=case.batch), case.q, case.k, case.v)
            assert case.problems(out) == []
        assert not decode.workspace.arrivals.any()


@needs_kernels
@by_length_and_in_runs
def test_every_sequence_has_its_programs_where_a_window_is_a_whole_number_of_splits(options: Options) -> None:
    """Three queries see 128 tokens, two splits; the four that they are rounded up to see 129, three."""
    case = make_case(Phase.DECODE, Workload(((3, 300),) * 4, window=126), make_shape())
    decode = Decode(case.shape, options=options)
    plan = decode.plan(case.batch)
    assert plan.shares.balanced and plan.shares.runs is options.runs
    assert case.problems(decode.run(plan, case.q, case.k, case.v)) == []


@needs_cuda
@every_dtype
def test_a_graph_replays_with_other_lengths_and_drafts(dtype: torch.dtype) -> None:
    shape = make_shape(9, 3, 64, dtype)
    static = make_case(Phase.DECODE, Workload(((5, 3000),) * 4), shape)
    bound = Triton(Phase.DECODE, shape)
    plan = bound.plan_capture(static.batch)
    bound.run(plan, static.q, static.k, static.v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bound.run(plan, static.q, static.k, static.v)
    for seed, lens in enumerate(((5, 700, 2999, 64), (5, 300, 0, 0), (3000,) * 4, (65, 0, 257, 0))):
        case = make_case(Phase.DECODE, Workload(tuple((5, kv_len) for kv_len in lens)), shape, seed=seed)
        for target, source in ((static.q, case.q), (static.k, case.k), (static.v, case.v)):
            target[: len(source)].copy_(source)
        static.batch.kv_lens.copy_(case.batch.kv_lens)
        static.batch.page_table.zero_()[:, : case.batch.page_table.shape[1]].copy_(case.batch.page_table)
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert out.isfinite().all()
        expected, real = case.reference(), case.real_rows()
        assert torch.allclose(out.double()[real], expected[real], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@needs_kernels
def test_verify_asks_for_drafts_of_those_who_claim_them() -> None:
    base = make_shape()
    assert workload(Subject(Triton, Phase.DECODE, base), DRAFTS["drafts_of_16"]) == []
    for backend in (Naive, TritonFlashDecodingPP):
        with pytest.raises(NotClaimed, match="16 new tokens a sequence, at most 1 are claimed"):
            workload(Subject(backend, Phase.DECODE, base), DRAFTS["drafts_of_16"])
    assert Triton.limits[Phase.DECODE].max_q_len == MAX_QUERIES == max(asked.max_q_len for asked in DRAFTS.values())


@pytest.mark.skipif(INTERPRETED, reason="of a backend that needs no kernel of ours")
def test_verify_skips_drafts_of_others_with_the_reason() -> None:
    report = verify(Naive, phases=[Phase.DECODE], dtypes=[torch.float32])
    outcomes = {check.name: check for check in report.checks if check.name in DRAFTS}
    assert set(outcomes) == set(DRAFTS)
    assert report.passed
    for check in outcomes.values():
        assert (check.outcome, "at most 1 are claimed" in check.detail) == ("not claimed", True)
