"""How a decode is shared out among programs: every token once, none of them late, whatever the lengths."""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import triton
import triton.language as tl

from tessera.attention.backends.triton import Triton
from tessera.attention.backends.triton_choice import shipped
from tessera.attention.backends.triton_decode import Decode, DecodePlan, TritonFlashDecoding, TritonPaged
from tessera.attention.backends.triton_options import Options, device_resources
from tessera.attention.contract import Phase, Shape
from tessera.attention.workloads import Case, Workload, make_batch, make_case
from tessera.kernels.decode_runs import paged_decode_kernel_of_runs
from tessera.kernels.decode_shares import find_share, lengths_block, share_by_length
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

FINE = Options(0, 32, 4, 2, programs_per_sm=2, min_split=64, balanced_per_sm=4)
"""Cuts short sequences too, so that tests are quick."""
RUNS = replace(FINE, balanced_per_sm=9, runs=True)
"""More programs than any test has sequences."""
WAYS = {"evenly": (False, FINE), "by length": (True, FINE), "in runs": (True, RUNS)}
in_every_way = pytest.mark.parametrize(("balanced", "options"), WAYS.values(), ids=WAYS)
UNLIKE = Workload(((1, 500), (1, 5), (1, 65), (1, 0), (1, 220), (1, 1)))


def make_shape(dtype: torch.dtype = torch.float16, window: int | None = None) -> Shape:
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
    return Shape(6, 2, 32, 32**-0.5, dtype, DEVICE, capability, 16, window)


def answer(decode: Decode, case: Case) -> tuple[DecodePlan, torch.Tensor]:
    plan = decode.plan(case.batch)
    return plan, decode.run(plan, case.q, case.k, case.v, case.sinks)


@pytest.mark.timeout(600)
@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@triton.jit
def find_shares(
    kv_lens: tl.tensor, found: tl.tensor, num_seqs: tl.tensor, num_splits: tl.tensor, min_split: tl.tensor,
    LONGEST: tl.constexpr, SEQS: tl.constexpr,  # noqa: N803
) -> None:  # fmt: skip
    unit = tl.program_id(0)
    seq, split, splits, part = find_share(kv_lens, num_seqs, unit, num_splits, min_split, LONGEST, SEQS, 16)
    tl.store(found + unit * 4, seq)
    tl.store(found + unit * 4 + 1, split)
    tl.store(found + unit * 4 + 2, splits)
    tl.store(found + unit * 4 + 3, part)


@needs_kernels
def test_every_token_has_one_program_and_every_part_a_place_of_its_own() -> None:
    draw = random.Random(0)
    for longest in (0, 100):
        for num_seqs in (2, 17, 70):
            lens = [draw.choice((0, 1, 16, 17, draw.randint(1, 3000))) for _ in range(num_seqs)]
            aim, min_split = draw.randint(1, 40), draw.choice((16, 128))
            shares = share_by_length(num_seqs, aim, min_split, longest or max(lens))
            aim = shares.num_splits
            found = torch.zeros(shares.num_units, 4, dtype=torch.int32, device=DEVICE)
            kv_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
            find_shares[(shares.num_units,)](kv_lens, found, num_seqs, aim, min_split, longest, lengths_block(num_seqs))
            rows = [tuple(row) for row in found.tolist()]
            real = [row for row in rows if row[1] < row[2]]
            splits = {seq: count for seq, _, count, _ in real}
            assert [row[:2] for row in real] == [(s, i) for s in range(num_seqs) for i in range(splits[s])]
            parts = [part + split for _, split, count, part in real if count > 1]
            assert parts == list(range(len(parts)))
            assert len(parts) <= shares.capacity(num_seqs)
            seen = [min(kv_len, longest or kv_len) for kv_len in lens]
            size = max(-(-sum(seen) // aim) + 16, min_split)  # in whole tiles
            assert all(-(-seen[seq] // count) <= size for seq, count in splits.items())


@needs_kernels
@every_dtype
@pytest.mark.parametrize("window", [None, 300])
@in_every_way
def test_unlike_lengths_equal_the_oracle_however_split(
    dtype: torch.dtype, window: int | None, balanced: bool, options: Options
) -> None:
    case = make_case(Phase.DECODE, replace(UNLIKE, window=window, sinks=True), make_shape(dtype))
    plan, out = answer(Decode(case.shape, balanced=balanced, options=options), case)
    assert (plan.shares.balanced, plan.shares.runs) == (balanced, options.runs)
    assert case.problems(out) == []
    assert not out[3].any()


@needs_kernels
def test_a_long_sequence_has_the_programs_that_short_ones_leave() -> None:
    """Split evenly, the longest of many sequences is one program's work; by length it is that of many."""
    shape = make_shape()
    programs = device_resources(shape)[0] * FINE.programs_per_sm
    lens = ((1, 1500), *((1, 10),) * (programs // shape.num_kv_heads - 1))
    case = make_case(Phase.DECODE, Workload(lens), shape)
    by_length, evenly = (Decode(case.shape, balanced=of, options=FINE) for of in (True, False))
    even, plan = evenly.plan(case.batch).shares, by_length.plan(case.batch).shares
    assert even.num_splits == 1
    size = max(-(-sum(kv_len for _, kv_len in lens) // plan.num_splits), FINE.min_split)
    assert -(-1500 // size) > 20
    assert plan.num_units <= plan.num_splits + len(lens)
    assert case.problems(answer(by_length, case)[1]) == []


@needs_kernels
@in_every_way
def test_garbage_in_the_workspace_and_in_unused_slots_reaches_no_answer(balanced: bool, options: Options) -> None:
    case = make_case(Phase.DECODE, UNLIKE, make_shape())
    live = torch.zeros(case.k.shape[:2], dtype=torch.bool, device=DEVICE)
    for row, kv_len in zip(case.batch.page_table.tolist(), case.batch.kv_lens_cpu):
        for position in range(kv_len):
            live[row[position // 16], position % 16] = True
    for pool in (case.k, case.v):
        pool[~live] = torch.nan
    case.q[3] = torch.nan  # of a padding row
    decode = Decode(case.shape, balanced=balanced, options=options)
    for _ in range(2):
        decode.workspace.part_out.fill_(torch.nan)
        decode.workspace.part_lse.fill_(torch.nan)
        _, out = answer(decode, case)
        assert case.problems(out) == []
        assert not out[3].any()
        assert not decode.workspace.arrivals.any()


@needs_kernels
@pytest.mark.parametrize("options", [FINE, RUNS], ids=["by length", "in runs"])
def test_one_plan_serves_any_lengths_as_a_replayed_graph_has_them(options: Options) -> None:
    for window in (None, 150):
        shape = make_shape(window=window)
        longest = make_case(Phase.DECODE, Workload(((1, 400),) * 4, window=window), shape)
        decode = Decode(shape, options=options)
        plan = decode.plan(longest.batch)
        assert plan.shares.balanced and plan.shares.runs is options.runs
        for lens in ((400, 1, 64, 0), (0, 0, 0, 0), (400, 400, 400, 400)):
            case = make_case(Phase.DECODE, Workload(tuple((1, n) for n in lens), window=window), shape)
            captured = replace(plan, batch=replace(case.batch, max_kv_len=400))
            assert case.problems(decode.run(captured, case.q, case.k, case.v)) == []
        assert not decode.workspace.arrivals.any()


@needs_kernels
def test_more_sequences_than_a_program_can_read_are_split_evenly() -> None:
    decode = Decode(make_shape(), options=FINE)
    for num_seqs, balanced in ((1024, True), (1025, False), (1, False)):
        batch = make_batch(((1, 99),) * num_seqs, torch.zeros(num_seqs, 7, dtype=torch.int32), 1)
        assert decode.plan(batch).shares.balanced is balanced


@needs_kernels
def test_short_sequences_are_cut_up_further_while_multiprocessors_would_idle() -> None:
    decode = Decode(make_shape(), options=replace(FINE, block_n=32, min_split=256, programs_per_sm=2))
    decode._sms = 132
    for num_seqs, longest, least in ((1, 512, 32), (1, 8192, 128), (16, 512, 128), (64, 512, 256), (1, 0, 32)):
        table = torch.zeros(num_seqs, 1, dtype=torch.int32)
        shares = decode.plan(replace(make_batch(((1, 9),) * num_seqs, table, 1), max_kv_len=longest)).shares
        assert (num_seqs, longest, shares.min_split) == (num_seqs, longest, least)


@needs_kernels
def test_the_rungs_share_out_as_their_names_say() -> None:
    case = make_case(Phase.DECODE, Workload(((1, 3000), (1, 5))), make_shape())
    paged, flash = (of(Phase.DECODE, case.shape).plan(case.batch).shares for of in (TritonPaged, TritonFlashDecoding))
    assert (paged.num_splits, paged.balanced) == (1, False)
    assert (flash.num_splits > 1, flash.balanced) == (True, False)
    own = Triton(Phase.DECODE, case.shape).plan(case.batch)
    assert isinstance(own, DecodePlan)
    assert own.shares.balanced


def decode_options(shape: Shape, num_seqs: int, max_q_len: int = 1) -> Options:
    """As shipped, on a device of 132 multiprocessors."""
    return shipped(Phase.DECODE, shape, 227 << 10).in_decode(shape, 132, num_seqs, max_q_len)


def test_options_follow_the_number_of_sequences_and_no_length() -> None:
    shape = replace(make_shape(torch.bfloat16), num_q_heads=32, num_kv_heads=8, head_dim=128)
    few, many = (decode_options(shape, num_seqs) for num_seqs in (8, 64))
    assert (few.block_n, few.num_warps) == (64, 2)
    assert (many.block_n, many.num_warps) == (32, 1)
    small = replace(shape, num_q_heads=9, num_kv_heads=3, head_dim=64)
    few, many = (decode_options(small, num_seqs) for num_seqs in (1, 256))
    assert ((few.num_stages, few.min_split), (many.num_stages, many.min_split)) == ((4, 128), (5, 128))
    full = replace(shape, dtype=torch.float32)
    assert decode_options(full, 8) == decode_options(full, 640)
    drafts = decode_options(shape, 64, max_q_len=16)
    assert drafts.num_warps == 4  # a warp multiplies 16 rows


@needs_compiler
@pytest.mark.parametrize(
    ("max_q_len", "balanced", "runs"),
    [(1, True, False), (5, False, False), (16, True, False), (1, True, True), (4, True, True)],
)
def test_it_compiles_for_hopper_into_asynchronous_copies_and_products(
    max_q_len: int, balanced: bool, runs: bool
) -> None:
    shape = replace(make_shape(torch.bfloat16), num_q_heads=32, num_kv_heads=8, head_dim=128)
    options = decode_options(shape, 64, max_q_len).arguments()
    scores = Scores(shape.scale, 100 if max_q_len > 1 else None, None)
    compiled = constants(Queries(torch.bfloat16, 32, 8, 128, 128), False, scores, max_q_len, options)
    num_warps = compiled.pop("num_warps")
    compiled |= {"K_HEAD_STRIDE": 128, "V_HEAD_STRIDE": 128, "PAGE_SIZE": 16, "CAUSAL": True}
    compiled |= {"SEQS": 64 if balanced else 0, "PDL": True} | ({} if runs else {"EARLY": False})
    kinds = dict.fromkeys(("q", "k", "v", "out"), "*bf16") | dict.fromkeys(("sinks", "part_out", "part_lse"), "*fp32")
    kinds |= dict.fromkeys(("page_table", "cu_q_lens", "kv_lens", "arrivals"), "*i32")
    kinds |= dict.fromkeys(("scale_log2", "cap_log2"), "fp32")
    kernel = paged_decode_kernel_of_runs if runs else paged_decode_kernel
    ptx = compile_for_hopper(kernel, kinds, compiled, num_warps)
    assert "cp.async" in ptx
    assert "mma" in ptx
    assert merges_what_others_wrote(ptx)
    # Lengths and the page table, which the step was given; keys and values are brought nearer, not read.
    assert loads_before_waiting(ptx) in ((6,) if runs and max_q_len > 1 else (4, 5))
    assert ptx.index("prefetch.global.L2") < ptx.index("griddepcontrol.wait")
