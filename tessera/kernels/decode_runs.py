"""Decode over pages where programs have equal runs of blocks, whichever sequences these are of.

The blocks of all sequences of a key head stand one behind the other and are shared out equally, as Stream-K shares out
products (arXiv 2301.03598): no program is late, whatever the lengths, as long as all of them are on the device at once.
A program takes up sequence after sequence; of the first and of the last it may have but a part (`decode_merge`).
The parts of a sequence that n programs share from program u on stand at 2 u .. 2 u + n - 1: the next one that is split
begins in the last of these programs or later, so that no two share a place.
"""

# ruff: noqa: N803, N806 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from tessera.kernels.decode_attend import attend_rows, prefetch_tokens
from tessera.kernels.decode_merge import finish_part
from tessera.kernels.decode_shares import lengths
from tessera.kernels.dependent import let_next_start, wait_for_launch
from tessera.kernels.packed import UNALIGNED


@triton.jit
def num_blocks(kv_len: tl.tensor, LONGEST: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Blocks that sequences of so many tokens have; of a padding row one, which writes its zeros.

    LONGEST  tokens that a sequence's queries see at most, 0: all
    """
    seen = tl.minimum(kv_len, LONGEST) if LONGEST > 0 else kv_len
    return tl.maximum(tl.cdiv(seen, BLOCK_N), 1)


@triton.jit
def own_run(
    kv_lens: tl.tensor, num_seqs: tl.tensor, unit: tl.tensor, num_units: tl.tensor, min_split: tl.tensor,
    LONGEST: tl.constexpr, SEQS: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """What program `unit` has of the blocks of all sequences, which are numbered one behind the other.

    min_split  tokens, in whole blocks: programs have no fewer blocks than these, or the last of them have none
    returns    begin, end: its blocks, none where they are equal; the first and the last sequence of these; the block
               that the first begins with; each, more: of the programs that have blocks, see `owner`
    """
    seq = tl.arange(0, SEQS)
    spans = tl.load(kv_lens + seq, mask=seq < num_seqs, other=0)
    blocks = tl.where(seq < num_seqs, num_blocks(spans, LONGEST, BLOCK_N), 0)
    total, ends = tl.sum(blocks, 0), tl.cumsum(blocks, 0)
    units = tl.maximum(tl.minimum(num_units, total // tl.maximum(min_split // BLOCK_N, 1)), 1)
    each, more = total // units, total % units
    begin = tl.where(unit < units, unit * each + tl.minimum(unit, more), total)
    end = tl.where(unit < units, begin + each + (unit < more).to(tl.int32), total)
    first = tl.minimum(tl.sum((ends <= begin).to(tl.int32), 0), num_seqs - 1)
    last = tl.minimum(tl.sum((ends < end).to(tl.int32), 0), num_seqs - 1)
    return begin, end, first, last, tl.sum(tl.where(seq < first, blocks, 0), 0), each, more


@triton.jit
def owner(block: tl.tensor, each: tl.tensor, more: tl.tensor) -> tl.tensor:
    """The program that has a block: `more` programs have one more than `each`, and they are the first."""
    long = more * (each + 1)
    return tl.where(block < long, block // (each + 1), more + (block - long) // tl.maximum(each, 1))


@triton.jit(
    do_not_specialize=["table_stride", "num_seqs", "num_splits", "min_split", "capacity"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def paged_decode_kernel_of_runs(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, page_table: tl.tensor, cu_q_lens: tl.tensor, kv_lens: tl.tensor,
    sinks: tl.tensor, out: tl.tensor, part_out: tl.tensor, part_lse: tl.tensor, arrivals: tl.tensor,
    scale_log2: tl.tensor, cap_log2: tl.tensor, q_stride: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor,
    table_stride: tl.tensor, num_seqs: tl.tensor, num_splits: tl.tensor, min_split: tl.tensor, capacity: tl.tensor,
    Q_HEAD_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr, V_HEAD_STRIDE: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, SEQS: tl.constexpr, QUERIES: tl.constexpr,
    ROW_TILES: tl.constexpr, PART_ROWS: tl.constexpr, ROWS: tl.constexpr, MERGE_ROWS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One run of blocks, for one tile of rows of one key head; grid (kv heads * ROW_TILES, num_splits)."""
    let_next_start(PDL)
    LONGEST: tl.constexpr = WINDOW + QUERIES - 1 if WINDOW > 0 else 0
    column, unit, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0) // ROW_TILES
    kv_head, first_row, parts = column // ROW_TILES, column % ROW_TILES * PART_ROWS, column.to(tl.int64) * capacity
    k_head, v_head = k + kv_head * K_HEAD_STRIDE, v + kv_head * V_HEAD_STRIDE
    block, end_block, seq, last, seq_block, each, more = own_run(
        kv_lens, num_seqs, unit, num_splits, min_split, LONGEST, SEQS, BLOCK_N
    )
    if PDL:
        kv_len, _, _, oldest = lengths(cu_q_lens, kv_lens, seq, QUERIES, WINDOW)
        prefetch_tokens(
            k_head, v_head, page_table + seq.to(tl.int64) * table_stride, oldest + (block - seq_block) * BLOCK_N,
            kv_len, k_stride, v_stride, HEAD_DIM, PAGE_SIZE, BLOCK_N,
        )  # fmt: skip
    wait_for_launch(PDL)
    for _ in range(last - seq + 1):
        kv_len, begin, q_len, oldest = lengths(cu_q_lens, kv_lens, seq, QUERIES, WINDOW)
        next_block = seq_block + num_blocks(kv_len, LONGEST, BLOCK_N)
        stop_block, start = tl.minimum(end_block, next_block), oldest + (block - seq_block) * BLOCK_N
        first_owner = owner(seq_block, each, more)
        part, first_part = unit - first_owner, parts + 2 * first_owner
        if (block < stop_block) & ((start < kv_len) | (part == 0)) & (first_row < q_len * GROUP):
            # Of a window, which differs with q_len, fewer blocks may be seen than were shared out.
            num_parts = owner(seq_block + num_blocks(kv_len - oldest, 0, BLOCK_N) - 1, each, more) - first_owner + 1
            num_rows = tl.minimum(q_len * GROUP - first_row, PART_ROWS)
            acc, lse = attend_rows(
                q + begin * q_stride, k_head, v_head, start, start, page_table + seq.to(tl.int64) * table_stride, sinks,
                start, tl.minimum(oldest + (stop_block - seq_block) * BLOCK_N, kv_len), kv_len - q_len, kv_head,
                first_row, num_rows, part == 0, scale_log2, cap_log2, q_stride, k_stride, v_stride, Q_HEAD_STRIDE,
                GROUP, HEAD_DIM, HEAD_PAD, PAGE_SIZE, CAUSAL, WINDOW, SOFT_CAP, SINKS, QUERIES, ROWS, BLOCK_N,
                PRECISION, NUM_STAGES, False,
            )  # fmt: skip
            finish_part(
                acc, lse, first_part + part, first_part, num_parts, arrivals + first_part,
                out + (begin * heads + kv_head) * (GROUP * HEAD_DIM), heads, num_rows, first_row, part_out, part_lse,
                GROUP, PART_ROWS, HEAD_DIM, HEAD_PAD, ROWS, MERGE_ROWS, PARTS,
            )  # fmt: skip
        seq, seq_block, block = seq + 1, next_block, stop_block
