"""Equal runs of blocks: every block has one program, all programs as many, and every split sequence is merged once."""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import triton
import triton.language as tl

from tessera.attention.backends.triton_choice import shipped
from tessera.attention.backends.triton_decode import Decode
from tessera.attention.backends.triton_options import INTERPRETED_SMS, Options
from tessera.attention.contract import Phase, Shape
from tessera.attention.workloads import Workload, make_batch, make_case
from tessera.kernels.decode_runs import own_run, owner
from tessera.kernels.decode_shares import lengths_block, share_in_runs
from triton_interpreter import DEVICE, check_in_interpreter, needs_kernels, outside_interpreter

RUNS = Options(0, 32, 4, 2, programs_per_sm=2, min_split=64, balanced_per_sm=9, runs=True)
"""More programs than any test has sequences."""


def make_shape(dtype: torch.dtype = torch.float16) -> Shape:
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
    return Shape(6, 2, 32, 32**-0.5, dtype, DEVICE, capability, 16)


@pytest.mark.timeout(600)
@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@triton.jit
def find_runs(
    kv_lens: tl.tensor, found: tl.tensor, num_seqs: tl.tensor, min_split: tl.tensor,
    LONGEST: tl.constexpr, SEQS: tl.constexpr,  # noqa: N803
) -> None:  # fmt: skip
    unit = tl.program_id(0)
    begin, end, first, last, seq_block, each, more = own_run(
        kv_lens, num_seqs, unit, tl.num_programs(0), min_split, LONGEST, SEQS, 16
    )
    row = found + unit * 6
    tl.store(row, begin)
    tl.store(row + 1, end)
    tl.store(row + 2, first)
    tl.store(row + 3, last)
    tl.store(row + 4, seq_block)
    tl.store(row + 5, owner(begin, each, more))


@needs_kernels
def test_every_block_has_one_program_and_all_programs_have_as_many() -> None:
    draw = random.Random(0)
    for longest in (0, 100):
        for num_seqs in (2, 17, 70):
            lens = [draw.choice((0, 1, 16, 17, draw.randint(1, 3000))) for _ in range(num_seqs)]
            aim, min_split = draw.randint(1, 40), draw.choice((16, 128))
            shares = share_in_runs(num_seqs, aim, min_split, longest or max(lens))
            found = torch.zeros(shares.num_splits, 6, dtype=torch.int32, device=DEVICE)
            kv_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
            find_runs[(shares.num_splits,)](kv_lens, found, num_seqs, min_split, longest, lengths_block(num_seqs))
            blocks = [max(1, -(-min(kv_len, longest or kv_len) // 16)) for kv_len in lens]
            of_seq = [seq for seq, count in enumerate(blocks) for _ in range(count)]
            runs = [(unit, *row) for unit, row in enumerate(found.tolist()) if row[0] < row[1]]
            assert [block for _, begin, end, *_ in runs for block in range(begin, end)] == list(range(len(of_seq)))
            sizes = {end - begin for _, begin, end, *_ in runs}
            assert max(sizes) - min(sizes) <= 1
            assert len(runs) == 1 or min(sizes) >= min_split // 16
            assert len(runs) == shares.num_splits or min(sizes) < 2 * max(1, min_split // 16)
            for unit, begin, end, first, last, seq_block, owned_by in runs:
                assert (first, last) == (of_seq[begin], of_seq[end - 1])
                assert seq_block == sum(blocks[:first])
                assert owned_by == unit


@needs_kernels
@pytest.mark.parametrize(
    "lens",
    [
        (2048,) * 2,  # many programs a sequence
        (96,) * 70,  # runs that end where sequences do, and some that do not
        (1, 3000, 1, 1, 1, 2000, 31, 33),  # one that many programs share, between short ones
        (400, 0, 0, 400, *(0,) * 20),  # padding rows within and behind
    ],
    ids=str,
)
@pytest.mark.parametrize("per_sm", [1, 9])  # as many programs of many blocks, or more programs than can have any
def test_wherever_runs_begin_and_end_every_sequence_is_merged_once(lens: tuple[int, ...], per_sm: int) -> None:
    case = make_case(Phase.DECODE, Workload(tuple((1, kv_len) for kv_len in lens)), make_shape())
    options = replace(RUNS, balanced_per_sm=per_sm)
    decode = Decode(case.shape, options=options)
    decode._sms = max(INTERPRETED_SMS, 2 * len(lens))  # enough programs for so many sequences
    decode.workspace.part_lse.fill_(torch.nan)
    plan = decode.plan(case.batch)
    out = decode.run(plan, case.q, case.k, case.v)
    assert plan.shares.runs and plan.shares.num_splits > 8
    assert case.problems(out) == []
    assert not decode.workspace.arrivals.any()
    # Programs run one after the other here, and would not notice that two parts share a place: so places are counted.
    written = decode.workspace.part_lse.isfinite().sum().item()
    assert written == case.shape.num_q_heads * num_parts(lens, plan.shares.num_splits, options.min_split)


def num_parts(lens: tuple[int, ...], programs: int, min_split: int) -> int:
    """Parts of one key head in runs of blocks of 32."""
    of_seq = [seq for seq, kv_len in enumerate(lens) for _ in range(max(1, -(-kv_len // 32)))]
    programs = max(1, min(programs, len(of_seq) // (min_split // 32)))
    each, more = divmod(len(of_seq), programs)
    of_program = [unit for unit in range(programs) for _ in range(each + (unit < more))]
    parts = set(zip(of_seq, of_program, strict=True))
    return sum(1 for seq, _ in parts if sum(other == seq for other, _ in parts) > 1)


@needs_kernels
def test_equal_runs_are_for_few_sequences_beside_programs_and_where_their_room_is_known() -> None:
    decode = Decode(make_shape(), options=RUNS)
    decode._sms = 8
    for num_seqs, runs in ((2, True), (53, True), (54, False), (80, False)):  # 8 * 9 programs, of two key heads
        batch = make_batch(((1, 99),) * num_seqs, torch.zeros(num_seqs, 7, dtype=torch.int32), 1)
        assert decode.plan(batch).shares.runs is runs
    wide = replace(make_shape(torch.bfloat16), num_q_heads=32, num_kv_heads=8, head_dim=128)
    known = replace(wide, capability=(9, 0))
    on_h200 = shipped(Phase.DECODE, known, 227 << 10, "NVIDIA H200")
    assert on_h200.in_decode(known, 132, 64).runs
    assert not on_h200.in_decode(known, 132, 64, max_q_len=16).runs  # of more warps fewer programs have room
    assert not shipped(Phase.DECODE, wide, 227 << 10, "NVIDIA GeForce RTX 4090").many.runs
