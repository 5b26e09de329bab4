"""Paged decode attention in Triton: split-KV Flash-Decoding (Dao et al. 2023) with packed GQA heads.

One program attends for `HEADS` kv heads of one sequence over one span of its tokens. The rows of its
tile are the q heads of those kv heads, padded to 16 for the tensor cores; where HEADS > 1 the query tile
is block diagonal, so that one dot serves all heads and a page is read in longer contiguous runs.

Three inner loops, chosen by DOT:
  "rows"   scores [ROWS, BLOCK_N] = q k^T           mma.sync, query rows are the M dimension
  "cols"   scores [BLOCK_N, ROWS] = k q^T           wgmma, tokens are the M dimension ("swap AB")
  "cores"  no dot; every token slot of a tile keeps its own online softmax, reduced once at the end

Two ways of sharing the work out:
  split    grid (head blocks, splits, seqs); a sequence's tokens are divided evenly among the splits, and
           splits with nothing to do return at once, so that one captured grid serves every length
  balance  a fixed number of workers shares all tiles of all sequences evenly (mixed lengths)

Partial results are merged by log-sum-exp, in a second kernel or by whichever program finishes last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


@triton.jit
def _token_rows(table_row, first, end, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cache rows (page * PAGE_SIZE + slot) of tokens first .. first + BLOCK_N, clamped to the last token. [BLOCK_N] int64"""
    token = tl.minimum(first + tl.arange(0, BLOCK_N), end - 1)
    page = tl.load(table_row + token // PAGE_SIZE).to(tl.int64)
    return page * PAGE_SIZE + token % PAGE_SIZE


@triton.jit
def _load_tile(pages, rows, columns, real, STRIDE: tl.constexpr, MASKED: tl.constexpr):
    """Rows of the cache as a tile. [BLOCK_N, WIDTH]"""
    pointers = pages + rows[:, None] * STRIDE + columns[None, :]
    if MASKED:
        return tl.load(pointers, mask=real[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _span_by_rows(
    q, k_pages, v_pages, table_row, start, end, columns, real, scale_log2,
    STRIDE: tl.constexpr, MASKED: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of q over tokens start .. end.

    q        [ROWS, WIDTH]
    returns  acc [ROWS, WIDTH] not yet divided, peak [ROWS] in log2 units, total [ROWS]
    """
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        rows = _token_rows(table_row, first, end, PAGE_SIZE, BLOCK_N)
        k = _load_tile(k_pages, rows, columns, real, STRIDE, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where((first + tl.arange(0, BLOCK_N) < end)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        v = _load_tile(v_pages, rows, columns, real, STRIDE, MASKED)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@triton.jit
def _span_by_columns(
    q, k_pages, v_pages, table_row, start, end, columns, real, scale_log2,
    STRIDE: tl.constexpr, MASKED: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """As _span_by_rows with every product transposed, so that tokens and dims are the M of a wgmma."""
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([WIDTH, ROWS], tl.float32)
    q_columns = tl.trans(q)
    for first in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        rows = _token_rows(table_row, first, end, PAGE_SIZE, BLOCK_N)
        k = _load_tile(k_pages, rows, columns, real, STRIDE, MASKED)
        scores = tl.dot(k, q_columns, input_precision=PRECISION) * scale_log2
        scores = tl.where((first + tl.arange(0, BLOCK_N) < end)[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 0))
        weights = tl.exp2(scores - new_peak[None, :])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 0)
        v = _load_tile(v_pages, rows, columns, real, STRIDE, MASKED)
        acc = tl.dot(tl.trans(v), weights.to(v.dtype), acc * shrink[None, :], input_precision=PRECISION)
        peak = new_peak
    return tl.trans(acc), peak, total


@triton.jit
def _span_by_cores(
    q, k_pages, v_pages, table_row, start, end, columns, real, scale_log2,
    STRIDE: tl.constexpr, MASKED: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """As _span_by_rows without tensor cores: BLOCK_N softmaxes run side by side, no warp waits for another."""
    peak = tl.full([ROWS, BLOCK_N], -1.0e30, tl.float32)
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_N, WIDTH], tl.float32)
    wide_q = q.to(tl.float32)[:, None, :] * scale_log2
    for first in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        rows = _token_rows(table_row, first, end, PAGE_SIZE, BLOCK_N)
        k = _load_tile(k_pages, rows, columns, real, STRIDE, MASKED).to(tl.float32)
        v = _load_tile(v_pages, rows, columns, real, STRIDE, MASKED).to(tl.float32)
        scores = tl.sum(wide_q * k[None, :, :], 2)
        scores = tl.where((first + tl.arange(0, BLOCK_N) < end)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, scores)
        weights = tl.exp2(scores - new_peak)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + weights
        acc = acc * shrink[:, :, None] + weights[:, :, None] * v[None, :, :]
        peak = new_peak
    row_peak = tl.max(peak, 1)
    shrink = tl.exp2(peak - row_peak[:, None])
    return tl.sum(acc * shrink[:, :, None], 1), row_peak, tl.sum(total * shrink, 1)


@triton.jit
def _attend_span(
    q, k_pages, v_pages, table_row, start, end, seq, head_block, scale_log2,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one head block of one sequence over tokens start .. end.

    returns  out [ROWS, WIDTH] divided by its total, lse [ROWS] in log2 units (-inf where there is no token)
    """
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    MASKED: tl.constexpr = HEADS * HEAD_DIM != WIDTH
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    head, dim = column // HEAD_PAD, column % HEAD_PAD
    real = (head < HEADS) & (dim < HEAD_DIM)
    mine = (row[:, None] // GROUP == head[None, :]) & real[None, :]
    q_row = seq.to(tl.int64) * Q_HEADS + head_block * (HEADS * GROUP) + row
    q_tile = tl.load(q + q_row[:, None] * HEAD_DIM + dim[None, :], mask=mine, other=0.0)
    columns = (head_block * HEADS + head) * HEAD_DIM + dim
    if DOT == "rows":
        acc, peak, total = _span_by_rows(
            q_tile, k_pages, v_pages, table_row, start, end, columns, real, scale_log2,
            KV_HEADS * HEAD_DIM, MASKED, PAGE_SIZE, BLOCK_N, ROWS, WIDTH, PRECISION, NUM_STAGES,
        )  # fmt: skip
    elif DOT == "cols":
        acc, peak, total = _span_by_columns(
            q_tile, k_pages, v_pages, table_row, start, end, columns, real, scale_log2,
            KV_HEADS * HEAD_DIM, MASKED, PAGE_SIZE, BLOCK_N, ROWS, WIDTH, PRECISION, NUM_STAGES,
        )  # fmt: skip
    else:
        acc, peak, total = _span_by_cores(
            q_tile, k_pages, v_pages, table_row, start, end, columns, real, scale_log2,
            KV_HEADS * HEAD_DIM, MASKED, PAGE_SIZE, BLOCK_N, ROWS, WIDTH, NUM_STAGES,
        )  # fmt: skip
    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    return acc / divisor[:, None], tl.where(some, peak + tl.log2(divisor), float("-inf"))


@triton.jit
def _store_rows(
    base, tile, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write each row's own head out of a [ROWS, WIDTH] tile to base [HEADS * GROUP, HEAD_DIM]."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    head, dim = column // HEAD_PAD, column % HEAD_PAD
    mine = (row[:, None] // GROUP == head[None, :]) & (row < HEADS * GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(base + row[:, None] * HEAD_DIM + dim[None, :], tile.to(base.dtype.element_ty), mask=mine)


@triton.jit
def _merge_parts(
    out, part_out, part_lse, first_part, next_part, step, count,
    NUM_ROWS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge `count` partial results by log-sum-exp. Part 0 is `first_part`, part i > 0 is `next_part + i * step`.

    part_out  [parts, NUM_ROWS, HEAD_DIM] float32
    part_lse  [parts, NUM_ROWS] float32, log2 units
    out       [NUM_ROWS, HEAD_DIM], contiguous
    """
    row, dim = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD)
    peak = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for begin in range(0, count, PARTS):
        i = begin + tl.arange(0, PARTS)
        part = tl.where(i == 0, first_part, next_part + i * step).to(tl.int64)
        at = part[None, :] * NUM_ROWS + row[:, None]
        real = (i < count)[None, :] & (row < NUM_ROWS)[:, None]
        # .cg: read from L2, where the other programs' results are; L1 may hold what stood here before.
        lse = tl.load(part_lse + at, mask=real, other=float("-inf"), cache_modifier=".cg")
        where = at[:, :, None] * HEAD_DIM + dim[None, None, :]
        tile = tl.load(
            part_out + where, mask=real[:, :, None] & (dim < HEAD_DIM)[None, None, :], other=0.0, cache_modifier=".cg"
        )
        new_peak = tl.maximum(peak, tl.max(lse, 1))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(lse - new_peak[:, None])
        acc = acc * shrink[:, None] + tl.sum(tile * weights[:, :, None], 1)
        total = total * shrink + tl.sum(weights, 1)
        peak = new_peak
    merged = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    mask = (row < NUM_ROWS)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(out + row[:, None] * HEAD_DIM + dim[None, :], merged.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _split_tokens(kv_len, num_splits, min_split, BLOCK_N: tl.constexpr):
    """Tokens of one split: kv_len shared evenly, in whole tiles, at least min_split."""
    return tl.maximum(tl.cdiv(tl.cdiv(kv_len, num_splits), BLOCK_N) * BLOCK_N, min_split)


@triton.jit(do_not_specialize=["table_stride", "num_splits", "min_split"])
def decode_split_kernel(
    q, k_pages, v_pages, page_table, kv_lens, out, part_out, part_lse, arrivals,
    scale_log2, table_stride, num_splits, min_split,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, FUSED: tl.constexpr,
    MERGE_ROWS: tl.constexpr, PARTS: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One split of one head block of one sequence; grid (head blocks, splits, seqs).

    q, out            [seqs, Q_HEADS, HEAD_DIM]
    k_pages, v_pages  [pages, PAGE_SIZE, KV_HEADS, HEAD_DIM]
    page_table        [seqs, table_stride] int32
    kv_lens           [seqs] int32
    part_out          [seqs, head blocks, num_splits, HEADS * GROUP, HEAD_DIM] float32
    part_lse          [seqs, head blocks, num_splits, HEADS * GROUP] float32
    arrivals          [seqs, head blocks] int32, all 0 between launches
    """
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    NUM_ROWS: tl.constexpr = HEADS * GROUP
    head_block, split, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_len = tl.load(kv_lens + seq)
    size = _split_tokens(kv_len, num_splits, min_split, BLOCK_N)
    start = split * size
    if (start >= kv_len) & (split > 0):
        return
    tile, lse = _attend_span(
        q, k_pages, v_pages, page_table + seq.to(tl.int64) * table_stride, start, tl.minimum(start + size, kv_len),
        seq, head_block, scale_log2,
        Q_HEADS, KV_HEADS, HEAD_DIM, HEAD_PAD, PAGE_SIZE, HEADS, ROWS, WIDTH, BLOCK_N, DOT, PRECISION, NUM_STAGES,
    )  # fmt: skip
    pair = seq.to(tl.int64) * tl.num_programs(0) + head_block
    target = out + pair * NUM_ROWS * HEAD_DIM
    if kv_len <= size:
        _store_rows(target, tile, GROUP, HEAD_DIM, HEAD_PAD, HEADS, ROWS, WIDTH)
        return
    part = pair * num_splits + split
    _store_rows(part_out + part * NUM_ROWS * HEAD_DIM, tile, GROUP, HEAD_DIM, HEAD_PAD, HEADS, ROWS, WIDTH)
    row = tl.arange(0, ROWS)
    tl.store(part_lse + part * NUM_ROWS + row, lse, mask=row < NUM_ROWS)
    if FUSED:
        num_parts = tl.cdiv(kv_len, size)
        tl.debug_barrier()  # every thread's part is written before this program says that it arrived
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
            tl.store(arrivals + pair, 0)
            first = pair * num_splits
            _merge_parts(
                target, part_out, part_lse, first, first, 1, num_parts, NUM_ROWS, MERGE_ROWS, HEAD_DIM, HEAD_PAD, PARTS
            )


@triton.jit(do_not_specialize=["num_splits", "min_split"])
def decode_merge_kernel(
    out, part_out, part_lse, kv_lens, num_splits, min_split,
    NUM_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    MERGE_ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one head block of one sequence; grid (head blocks, seqs). Shapes as decode_split_kernel."""
    head_block, seq = tl.program_id(0), tl.program_id(1)
    kv_len = tl.load(kv_lens + seq)
    size = _split_tokens(kv_len, num_splits, min_split, BLOCK_N)
    if kv_len <= size:
        return
    pair = seq.to(tl.int64) * tl.num_programs(0) + head_block
    first = pair * num_splits
    _merge_parts(
        out + pair * NUM_ROWS * HEAD_DIM, part_out, part_lse, first, first, 1, tl.cdiv(kv_len, size),
        NUM_ROWS, MERGE_ROWS, HEAD_DIM, HEAD_PAD, PARTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_seqs"])
def count_tiles_kernel(kv_lens, cu_tiles, num_seqs, BLOCK_N: tl.constexpr, SEQS: tl.constexpr):
    """Prefix sums of tiles a sequence, at least one each; one program, once a step, before layer 0.

    kv_lens   [num_seqs] int32
    cu_tiles  [num_seqs + 1] int32
    """
    seq = tl.arange(0, SEQS)
    real = seq < num_seqs
    tiles = tl.maximum(tl.cdiv(tl.load(kv_lens + seq, mask=real, other=0), BLOCK_N), 1)
    ends = tl.cumsum(tl.where(real, tiles, 0), 0)
    tl.store(cu_tiles + 1 + seq, ends, mask=real)
    tl.store(cu_tiles + seq, tl.zeros([SEQS], tl.int32), mask=seq == 0)


@triton.jit(do_not_specialize=["table_stride", "num_seqs"])
def decode_balanced_kernel(
    q, k_pages, v_pages, page_table, kv_lens, cu_tiles, out, part_out, part_lse, arrivals,
    scale_log2, table_stride, num_seqs,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, SEQS: tl.constexpr,
    MERGE_ROWS: tl.constexpr, PARTS: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One worker's even share of all tiles of one head block; grid (head blocks, workers).

    cu_tiles  [seqs + 1] int32, from count_tiles_kernel with the same BLOCK_N
    part_out  [head blocks, workers, 2, HEADS * GROUP, HEAD_DIM] float32; slot 1 is for a sequence that a worker
              begins but does not finish, after its first piece
    part_lse  [head blocks, workers, 2, HEADS * GROUP] float32
    arrivals  [seqs, head blocks] int32, all 0 between launches
    """
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    NUM_ROWS: tl.constexpr = HEADS * GROUP
    head_block, worker = tl.program_id(0), tl.program_id(1)
    num_tiles = tl.load(cu_tiles + num_seqs)
    num_workers = tl.minimum(tl.num_programs(1), num_tiles)  # no worker between two others may be idle
    if worker >= num_workers:
        return
    begin = (worker.to(tl.int64) * num_tiles // num_workers).to(tl.int32)
    stop = ((worker + 1).to(tl.int64) * num_tiles // num_workers).to(tl.int32)
    i = tl.arange(0, SEQS)
    ends = tl.load(cu_tiles + 1 + i, mask=i < num_seqs, other=2147483647)
    seq = tl.sum((ends <= begin).to(tl.int32), 0)
    at = begin
    while at < stop:
        seq_begin, seq_end = tl.load(cu_tiles + seq), tl.load(cu_tiles + seq + 1)
        kv_len = tl.load(kv_lens + seq)
        piece_end = tl.minimum(stop, seq_end)
        tile, lse = _attend_span(
            q, k_pages, v_pages, page_table + seq.to(tl.int64) * table_stride,
            (at - seq_begin) * BLOCK_N, tl.minimum((piece_end - seq_begin) * BLOCK_N, kv_len),
            seq, head_block, scale_log2,
            Q_HEADS, KV_HEADS, HEAD_DIM, HEAD_PAD, PAGE_SIZE, HEADS, ROWS, WIDTH, BLOCK_N, DOT, PRECISION, NUM_STAGES,
        )  # fmt: skip
        pair = seq.to(tl.int64) * tl.num_programs(0) + head_block
        target = out + pair * NUM_ROWS * HEAD_DIM
        if (at == seq_begin) & (piece_end == seq_end):
            _store_rows(target, tile, GROUP, HEAD_DIM, HEAD_PAD, HEADS, ROWS, WIDTH)
        else:
            parts = head_block.to(tl.int64) * tl.num_programs(1) * 2
            part = parts + worker * 2 + (at != begin).to(tl.int32)
            _store_rows(part_out + part * NUM_ROWS * HEAD_DIM, tile, GROUP, HEAD_DIM, HEAD_PAD, HEADS, ROWS, WIDTH)
            row = tl.arange(0, ROWS)
            tl.store(part_lse + part * NUM_ROWS + row, lse, mask=row < NUM_ROWS)
            # The worker of tile t is the last w with w * num_tiles // num_workers <= t.
            first_worker = ((seq_begin + 1).to(tl.int64) * num_workers - 1) // num_tiles
            last_worker = (seq_end.to(tl.int64) * num_workers - 1) // num_tiles
            num_parts = (last_worker - first_worker + 1).to(tl.int32)
            tl.debug_barrier()  # every thread's part is written before this program says that it arrived
            if tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
                tl.store(arrivals + pair, 0)
                late = (first_worker * num_tiles // num_workers != seq_begin).to(tl.int32)
                rest = parts + first_worker * 2
                _merge_parts(
                    target, part_out, part_lse, rest + late, rest, 2, num_parts,
                    NUM_ROWS, MERGE_ROWS, HEAD_DIM, HEAD_PAD, PARTS,
                )  # fmt: skip
        at = piece_end
        seq += 1


@dataclass(frozen=True)
class DecodeConfig:
    """How a decode kernel is compiled and launched."""

    dot: str = "rows"
    """rows, cols or cores; see the module."""
    block_n: int = 64
    """Tokens a tile."""
    heads: int = 1
    """kv heads a program; must divide the kv heads."""
    num_warps: int = 4
    num_stages: int = 3
    num_splits: int | None = None
    """Splits a sequence; None: chosen from the batch."""
    min_split: int = 256
    """Fewest tokens a split."""
    fused: bool = True
    """Whether the last program merges, rather than a second kernel."""
    balanced: bool = False
    """Whether a fixed number of workers shares all tiles evenly."""
    programs_per_sm: int = 2
    """Programs to aim for, a multiprocessor."""

    def name(self) -> str:
        """A short label, unique among configurations."""
        merge = "balanced" if self.balanced else "fused" if self.fused else "merge"
        splits = f"s{self.num_splits}" if self.num_splits else f"auto{self.programs_per_sm}"
        shape = f"{self.dot} n{self.block_n} h{self.heads} w{self.num_warps} st{self.num_stages}"
        return f"{shape} {merge} {splits} min{self.min_split}"


def choose_splits(num_seqs: int, head_blocks: int, max_kv_len: int, programs: int, min_split: int) -> int:
    """Splits a sequence so that the grid has about `programs` programs of at least `min_split` tokens each."""
    most = max(1, -(-max_kv_len // min_split))
    return max(1, min(most, programs // (num_seqs * head_blocks)))


class PagedDecode:
    """Decode attention for one shape; buffers are made once, so that a CUDA graph may record `run`."""

    def __init__(
        self, num_q_heads: int, num_kv_heads: int, head_dim: int, scale: float, page_size: int,
        max_seqs: int, max_kv_len: int, num_sms: int, device: torch.device | str, config: DecodeConfig,
    ) -> None:  # fmt: skip
        """Choose the grid for batches of up to max_seqs sequences of up to max_kv_len tokens."""
        self.config, self.scale_log2, self.max_seqs = config, scale * LOG2_E, max_seqs
        self.num_q_heads, self.num_kv_heads, self.head_dim, self.page_size = (
            num_q_heads,
            num_kv_heads,
            head_dim,
            page_size,
        )
        self.head_blocks = num_kv_heads // config.heads
        programs = num_sms * config.programs_per_sm
        self.workers = max(1, programs // self.head_blocks)
        chosen = choose_splits(max_seqs, self.head_blocks, max_kv_len, programs, config.min_split)
        self.num_splits = config.num_splits or chosen
        self.num_rows = config.heads * num_q_heads // num_kv_heads
        parts = self.head_blocks * (self.workers * 2 if config.balanced else self.num_splits * max_seqs)
        self.part_out = torch.empty(parts, self.num_rows, head_dim, dtype=torch.float32, device=device)
        self.part_lse = torch.empty(parts, self.num_rows, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(max_seqs * self.head_blocks, dtype=torch.int32, device=device)
        self.cu_tiles = torch.zeros(max_seqs + 1, dtype=torch.int32, device=device)

    def constants(self, dtype: torch.dtype) -> dict[str, object]:
        """The compile-time arguments that all decode kernels share."""
        config, pad = self.config, triton.next_power_of_2(self.head_dim)
        rows = triton.next_power_of_2(self.num_rows)
        merge_parts = max(1, min(16, 8192 // (rows * pad)))
        return {
            "Q_HEADS": self.num_q_heads, "KV_HEADS": self.num_kv_heads, "HEAD_DIM": self.head_dim, "HEAD_PAD": pad,
            "PAGE_SIZE": self.page_size, "HEADS": config.heads, "BLOCK_N": config.block_n, "DOT": config.dot,
            "ROWS": rows if config.dot == "cores" else max(16, rows), "WIDTH": triton.next_power_of_2(config.heads) * pad,
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32", "MERGE_ROWS": rows, "PARTS": merge_parts,
            "NUM_STAGES": config.num_stages, "num_warps": config.num_warps,
        }  # fmt: skip

    def plan(self, kv_lens: Tensor) -> None:
        """Once a step, before layer 0: count tiles on the device (balanced work only)."""
        if self.config.balanced:
            seqs = max(256, triton.next_power_of_2(kv_lens.numel()))
            count_tiles_kernel[(1,)](kv_lens, self.cu_tiles, kv_lens.numel(), BLOCK_N=self.config.block_n, SEQS=seqs)

    def run(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, out: Tensor
    ) -> None:
        """Attend: one new token a sequence.

        q, out            [seqs, q_heads, head_dim]
        k_pages, v_pages  [pages, page_size, kv_heads, head_dim]
        page_table        [seqs, max_pages] int32
        kv_lens           [seqs] int32
        """
        if self.config.balanced:
            self._run_balanced(q, k_pages, v_pages, page_table, kv_lens, out)
        else:
            self._run_split(q, k_pages, v_pages, page_table, kv_lens, out)

    def _run_balanced(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, out: Tensor
    ) -> None:
        seqs = max(256, triton.next_power_of_2(q.shape[0]))
        decode_balanced_kernel[(self.head_blocks, self.workers)](
            q, k_pages, v_pages, page_table, kv_lens, self.cu_tiles, out, self.part_out, self.part_lse, self.arrivals,
            self.scale_log2, page_table.stride(0), q.shape[0], SEQS=seqs, **self.constants(q.dtype),
        )  # fmt: skip

    def _run_split(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, out: Tensor
    ) -> None:
        constants, config = self.constants(q.dtype), self.config
        decode_split_kernel[(self.head_blocks, self.num_splits, q.shape[0])](
            q, k_pages, v_pages, page_table, kv_lens, out, self.part_out, self.part_lse, self.arrivals,
            self.scale_log2, page_table.stride(0), self.num_splits, config.min_split,
            FUSED=config.fused, **constants,
        )  # fmt: skip
        if self.num_splits > 1 and not config.fused:
            decode_merge_kernel[(self.head_blocks, q.shape[0])](
                out, self.part_out, self.part_lse, kv_lens, self.num_splits, config.min_split, NUM_ROWS=self.num_rows,
                num_warps=4,
                **{k: constants[k] for k in ("HEAD_DIM", "HEAD_PAD", "BLOCK_N", "MERGE_ROWS", "PARTS")},
            )  # fmt: skip
