"""Few short sequences: a program for each block of tokens, which reads what is old before its step begins."""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tessera.attention.backends.triton import Triton
from tessera.attention.backends.triton_choice import shipped
from tessera.attention.backends.triton_decode import ONE_BLOCK, Decode, DecodePlan, TritonFlashDecoding
from tessera.attention.backends.triton_options import Options
from tessera.attention.contract import Phase, Shape
from tessera.attention.workloads import Workload, make_batch, make_case
from tessera.kernels.paged_decode import Queries, constants, paged_decode_kernel
from tessera.kernels.scores import Scores
from triton_interpreter import (
    DEVICE,
    check_in_interpreter,
    compile_for_hopper,
    every_dtype,
    loads_before_waiting,
    merges_what_others_wrote,
    needs_compiler,
    needs_kernels,
    outside_interpreter,
)


def make_shape(dtype: torch.dtype = torch.float16, heads: tuple[int, int, int] = (6, 2, 32)) -> Shape:
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
    return Shape(*heads, heads[2] ** -0.5, dtype, DEVICE, capability, 16)


def plan_of(shape: Shape, num_seqs: int, longest: int, max_q_len: int = 1) -> DecodePlan:
    batch = make_batch(((max_q_len, 20),) * num_seqs, torch.zeros(num_seqs, 2, dtype=torch.int32), 1)
    decode = Decode(shape)
    decode._sms = 132
    return decode.plan(replace(batch, max_kv_len=longest))


@pytest.mark.timeout(600)
@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@every_dtype
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("max_q_len", [1, 3])
def test_blocks_equal_the_oracle_with_garbage_in_unused_slots(
    dtype: torch.dtype, window: int | None, max_q_len: int
) -> None:
    """Tokens of this step first in a block, last in one, and in two; rows without tokens."""
    if dtype == torch.float32:
        pytest.skip("float32 has no such plans")
    lens = (1, 31, 32, 33, 34, 64, 65, 0, 200)
    requests = tuple((max(1, min(max_q_len, kv_len)), kv_len) for kv_len in lens)
    case = make_case(Phase.DECODE, Workload(requests, window=window, sinks=True), make_shape(dtype))
    live = torch.zeros(case.k.shape[:2], dtype=torch.bool, device=DEVICE)
    for row, kv_len in zip(case.batch.page_table.tolist(), case.batch.kv_lens_cpu):
        for position in range(kv_len):
            live[row[position // 16], position % 16] = True
    k, v = (pages.masked_fill(~live[:, :, None, None], torch.nan) for pages in (case.k, case.v))
    decode = Decode(case.shape)
    plan = decode.plan(case.batch)
    assert plan.shares.one_block
    decode.workspace.part_out.fill_(torch.nan)
    assert case.problems(decode.run(plan, case.q, k, v, case.sinks)) == []
    assert not decode.workspace.arrivals.any()


@needs_kernels
def test_a_graph_for_longer_sequences_serves_shorter_ones() -> None:
    decode = Decode(make_shape())
    longest = make_case(Phase.DECODE, Workload(((1, 512),) * 3), decode.shape)
    plan = decode.plan(longest.batch)
    assert plan.shares.one_block
    for lens in ((400, 1, 64), (0, 0, 0), (512, 33, 32)):
        case = make_case(Phase.DECODE, Workload(tuple((1, n) for n in lens)), decode.shape)
        captured = replace(plan, batch=replace(case.batch, max_kv_len=512))
        assert case.problems(decode.run(captured, case.q, case.k, case.v)) == []


@needs_kernels
def test_blocks_are_for_few_short_sequences_in_half_types_and_for_nobody_who_asks_for_options() -> None:
    half = make_shape(heads=(9, 3, 64))
    (small, _, most), (large, _, _) = ONE_BLOCK
    found = {
        (num_seqs, longest): plan_of(half, num_seqs, longest).shares
        for num_seqs, longest in ((1, 1), (1, most), (1, most + 1), (8, 512), (32, 512), (34, 512), (200, 512))
    }
    assert {key for key, shares in found.items() if shares.one_block} == {(1, 1), (1, most), (8, 512), (32, 512)}
    assert [found[key].min_split for key in ((8, 512), (32, 512))] == [small, large]
    assert all(plan.shares.num_splits * small >= 512 for plan in (plan_of(half, 1, 512), plan_of(half, 8, 512)))
    for other in (make_shape(torch.float32, (9, 3, 64)), make_shape(heads=(9, 3, 256))):
        assert not plan_of(other, 1, 512).shares.one_block
    assert plan_of(half, 1, 512, max_q_len=4).shares.one_block
    assert not plan_of(half, 1, 512, max_q_len=16).shares.one_block  # 48 rows of queries
    batch = make_batch(((1, 20),), torch.zeros(1, 2, dtype=torch.int32), 1)
    asked = (Decode(half, options=Options(0, 32, 4, 2, programs_per_sm=2, min_split=64)), Decode(half, split=False))
    assert not any(decode.plan(batch).shares.one_block for decode in asked)
    assert not TritonFlashDecoding(Phase.DECODE, half).plan(batch).shares.one_block
    served, tried = Triton(Phase.DECODE, half), Triton(Phase.DECODE, half, shipped(Phase.DECODE, half, 227 << 10))
    crowded = Triton(Phase.DECODE, make_shape(heads=(32, 1, 64)))  # of more rows than a tile that is done so
    for each, in_blocks in ((served, True), (tried, False), (crowded, False)):
        plan = each.plan(batch)
        assert isinstance(plan, DecodePlan) and plan.shares.one_block == in_blocks
        assert ("a block a program" in each.options_from) == in_blocks


@needs_compiler
@pytest.mark.parametrize("heads", [(9, 3, 64), (16, 8, 128), (32, 8, 128)])
@pytest.mark.parametrize("block", [block for block, _, _ in ONE_BLOCK])
def test_old_keys_and_values_are_read_before_the_wait_and_new_ones_behind(
    heads: tuple[int, int, int], block: int
) -> None:
    shape = make_shape(torch.bfloat16, heads)
    scores = Scores(shape.scale, None, None)
    options = Options(0, block, 2, 1, programs_per_sm=1, min_split=block).arguments()
    queries = Queries(torch.bfloat16, *heads, heads[2])
    compiled = constants(queries, False, scores, 1, options)
    num_warps = compiled.pop("num_warps")
    compiled |= {"K_HEAD_STRIDE": heads[2], "V_HEAD_STRIDE": heads[2], "PAGE_SIZE": 16, "CAUSAL": True}
    compiled |= {"SEQS": 0, "PDL": True, "EARLY": True}
    kinds = dict.fromkeys(("q", "k", "v", "out"), "*bf16") | dict.fromkeys(("sinks", "part_out", "part_lse"), "*fp32")
    kinds |= dict.fromkeys(("page_table", "cu_q_lens", "kv_lens", "arrivals"), "*i32")
    kinds |= dict.fromkeys(("scale_log2", "cap_log2"), "fp32")
    ptx = compile_for_hopper(paged_decode_kernel, kinds, compiled, num_warps)
    threads, each = 32 * num_warps, 16  # bytes a thread reads at a time
    of_keys = block * heads[2] * 2 // (threads * each)
    assert loads_before_waiting(ptx) >= 2 * of_keys
    before, _, after = ptx.partition("griddepcontrol.wait")
    assert before.count("ld.global.cg") >= 2 * of_keys
    assert after.partition("atom.global")[0].count("ld.global.cg") >= 2 * of_keys
    assert merges_what_others_wrote(ptx)
