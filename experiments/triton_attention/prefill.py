"""Prefill attention in Triton: FlashAttention-2 partitioning (Dao 2023), one program a tile of queries of one head.

`paged_prefill_kernel` is causal over pages, queries aligned to the end of their sequence; tiles wholly below
the diagonal run in a loop without masks, and the last tiles in a second loop. Programs with the most work start
first. `packed_kernel` attends within packed segments without a mask (vision towers). Head dims that are no
power of two are cut into HEAD_MAIN + HEAD_TAIL (80 = 64 + 16), so that little is computed on padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


@triton.jit
def _update(
    q, q_tail, k, k_tail, v, v_tail, acc, acc_tail, peak, total, visible, scale_log2,
    HAS_TAIL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax.

    q        [BLOCK_M, HEAD_MAIN]     q_tail    [BLOCK_M, HEAD_TAIL]
    k, v     [BLOCK_N, HEAD_MAIN]     k_tail, v_tail  [BLOCK_N, HEAD_TAIL]
    visible  [BLOCK_M, BLOCK_N] bool, read where MASKED
    returns  acc, acc_tail, peak [BLOCK_M] in log2 units, total [BLOCK_M]
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_TAIL:
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    cast = weights.to(v.dtype)
    acc = tl.dot(cast, v, acc * shrink[:, None], input_precision=PRECISION)
    if HAS_TAIL:
        acc_tail = tl.dot(cast, v_tail, acc_tail * shrink[:, None], input_precision=PRECISION)
    return acc, acc_tail, new_peak, total


@triton.jit
def _load(pointers, rows, columns, STRIDE, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Rows of keys or values. [BLOCK_N, len(columns)]"""
    where = pointers + rows[:, None] * STRIDE + columns[None, :]
    if HEAD_DIM != HEAD_PAD:
        return tl.load(where, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    return tl.load(where)


@triton.jit
def _paged_loop(
    q, q_tail, k_head, v_head, table_row, start, end, kv_len, position, acc, acc_tail, peak, total, scale_log2,
    STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over tokens start .. end. position [BLOCK_M, 1]: the last token that each query sees."""
    HEAD_PAD: tl.constexpr = HEAD_MAIN + HEAD_TAIL
    HAS_TAIL: tl.constexpr = HEAD_TAIL > 0
    main = tl.arange(0, HEAD_MAIN)
    tail = HEAD_MAIN + tl.arange(0, HEAD_TAIL if HAS_TAIL else HEAD_MAIN)
    for first in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        token = first + tl.arange(0, BLOCK_N)
        safe = tl.minimum(token, kv_len - 1) if MASKED else token
        rows = tl.load(table_row + safe // PAGE_SIZE).to(tl.int64) * PAGE_SIZE + safe % PAGE_SIZE
        k = _load(k_head, rows, main, STRIDE, HEAD_DIM, HEAD_PAD)
        v = _load(v_head, rows, main, STRIDE, HEAD_DIM, HEAD_PAD)
        k_tail, v_tail = k, v
        if HAS_TAIL:
            k_tail = _load(k_head, rows, tail, STRIDE, HEAD_DIM, HEAD_PAD)
            v_tail = _load(v_head, rows, tail, STRIDE, HEAD_DIM, HEAD_PAD)
        acc, acc_tail, peak, total = _update(
            q, q_tail, k, k_tail, v, v_tail, acc, acc_tail, peak, total, token[None, :] <= position, scale_log2,
            HAS_TAIL, MASKED, PRECISION,
        )  # fmt: skip
    return acc, acc_tail, peak, total


@triton.jit(do_not_specialize=["table_stride"])
def paged_prefill_kernel(
    q, k_pages, v_pages, page_table, cu_q_lens, kv_lens, out, scale_log2, table_stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr,
    HEAD_TAIL: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; grid (q heads, seqs, tiles of the longest sequence).

    q, out            [tokens, Q_HEADS, HEAD_DIM]
    k_pages, v_pages  [pages, PAGE_SIZE, KV_HEADS, HEAD_DIM]
    page_table        [seqs, table_stride] int32
    cu_q_lens         [seqs + 1] int32
    kv_lens           [seqs] int32
    """
    HAS_TAIL: tl.constexpr = HEAD_TAIL > 0
    STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    head, seq = tl.program_id(0), tl.program_id(1)
    q_begin = tl.load(cu_q_lens + seq)
    q_len = tl.load(cu_q_lens + seq + 1) - q_begin
    tile = tl.cdiv(q_len, BLOCK_M) - 1 - tl.program_id(2)  # the longest rows start first
    if tile < 0:
        return
    kv_len = tl.load(kv_lens + seq)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    position = kv_len - q_len + m
    main = tl.arange(0, HEAD_MAIN)
    tail = HEAD_MAIN + tl.arange(0, HEAD_TAIL if HAS_TAIL else HEAD_MAIN)
    q_rows = (q_begin + m).to(tl.int64)[:, None] * (Q_HEADS * HEAD_DIM) + head * HEAD_DIM
    q_real = (m < q_len)[:, None]
    main_real, tail_real = q_real & (main < HEAD_DIM)[None, :], q_real & (tail < HEAD_DIM)[None, :]
    q_main = tl.load(q + q_rows + main[None, :], mask=main_real, other=0.0)
    acc = tl.zeros([BLOCK_M, HEAD_MAIN], tl.float32)
    q_tail, acc_tail = q_main, acc
    if HAS_TAIL:
        q_tail = tl.load(q + q_rows + tail[None, :], mask=tail_real, other=0.0)
        acc_tail = tl.zeros([BLOCK_M, HEAD_TAIL], tl.float32)
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    table_row = page_table + seq.to(tl.int64) * table_stride
    kv_head = head // (Q_HEADS // KV_HEADS) * HEAD_DIM
    first_position = kv_len - q_len + tile * BLOCK_M
    whole = (first_position + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(first_position + BLOCK_M, kv_len)
    acc, acc_tail, peak, total = _paged_loop(
        q_main, q_tail, k_pages + kv_head, v_pages + kv_head, table_row, 0, whole, kv_len, position[:, None],
        acc, acc_tail, peak, total, scale_log2, STRIDE, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, PAGE_SIZE, BLOCK_N,
        False, PRECISION, NUM_STAGES,
    )  # fmt: skip
    acc, acc_tail, peak, total = _paged_loop(
        q_main, q_tail, k_pages + kv_head, v_pages + kv_head, table_row, whole, end, kv_len, position[:, None],
        acc, acc_tail, peak, total, scale_log2, STRIDE, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, PAGE_SIZE, BLOCK_N,
        True, PRECISION, NUM_STAGES,
    )  # fmt: skip
    tl.store(out + q_rows + main[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=main_real)
    if HAS_TAIL:
        tl.store(out + q_rows + tail[None, :], (acc_tail / total[:, None]).to(out.dtype.element_ty), mask=tail_real)


@triton.jit
def _tma_loop(
    q, k_rows, v_rows, table_row, start, end, column, position, acc, peak, total, scale_log2,
    PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """As _paged_loop; a tile lies within one page and comes by one bulk tensor copy."""
    for first in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        row = tl.load(table_row + first // PAGE_SIZE) * PAGE_SIZE + first % PAGE_SIZE
        k = k_rows.load([row, column])
        v = v_rows.load([row, column])
        visible = (first + tl.arange(0, BLOCK_N))[None, :] <= position
        acc, _, peak, total = _update(
            q, q, k, k, v, v, acc, acc, peak, total, visible, scale_log2, False, MASKED, PRECISION
        )
    return acc, peak, total


@triton.jit(do_not_specialize=["table_stride"])
def tma_prefill_kernel(
    q, k_rows, v_rows, page_table, cu_q_lens, kv_lens, out, scale_log2, table_stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """As paged_prefill_kernel for pages of whole tiles and head dims that are powers of two.

    k_rows, v_rows  host tensor descriptors over [pages * PAGE_SIZE, KV_HEADS * HEAD_DIM], block [BLOCK_N, HEAD_DIM]
    The slots of a sequence's last page past its end are read and masked, so they must hold finite numbers.
    """
    head, seq = tl.program_id(0), tl.program_id(1)
    q_begin = tl.load(cu_q_lens + seq)
    q_len = tl.load(cu_q_lens + seq + 1) - q_begin
    tile = tl.cdiv(q_len, BLOCK_M) - 1 - tl.program_id(2)
    if tile < 0:
        return
    kv_len = tl.load(kv_lens + seq)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, HEAD_DIM)
    position = (kv_len - q_len + m)[:, None]
    q_where = (q_begin + m).to(tl.int64)[:, None] * (Q_HEADS * HEAD_DIM) + head * HEAD_DIM + dim[None, :]
    q_tile = tl.load(q + q_where, mask=(m < q_len)[:, None], other=0.0)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    table_row = page_table + seq.to(tl.int64) * table_stride
    column = head // (Q_HEADS // KV_HEADS) * HEAD_DIM
    first_position = kv_len - q_len + tile * BLOCK_M
    whole = (first_position + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(first_position + BLOCK_M, kv_len)
    acc, peak, total = _tma_loop(
        q_tile, k_rows, v_rows, table_row, 0, whole, column, position, acc, peak, total, scale_log2,
        PAGE_SIZE, BLOCK_N, False, PRECISION, NUM_STAGES,
    )  # fmt: skip
    acc, peak, total = _tma_loop(
        q_tile, k_rows, v_rows, table_row, whole, end, column, position, acc, peak, total, scale_log2,
        PAGE_SIZE, BLOCK_N, True, PRECISION, NUM_STAGES,
    )  # fmt: skip
    tl.store(out + q_where, (acc / total[:, None]).to(out.dtype.element_ty), mask=(m < q_len)[:, None])


@triton.jit
def _packed_loop(
    q, q_tail, k_head, v_head, start, end, last, stride, acc, acc_tail, peak, total, scale_log2,
    HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over packed tokens start .. end; `last` is the segment's last token."""
    HEAD_PAD: tl.constexpr = HEAD_MAIN + HEAD_TAIL
    HAS_TAIL: tl.constexpr = HEAD_TAIL > 0
    main = tl.arange(0, HEAD_MAIN)
    tail = HEAD_MAIN + tl.arange(0, HEAD_TAIL if HAS_TAIL else HEAD_MAIN)
    for first in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        token = first + tl.arange(0, BLOCK_N)
        rows = (tl.minimum(token, last) if MASKED else token).to(tl.int64)
        k = _load(k_head, rows, main, stride, HEAD_DIM, HEAD_PAD)
        v = _load(v_head, rows, main, stride, HEAD_DIM, HEAD_PAD)
        k_tail, v_tail = k, v
        if HAS_TAIL:
            k_tail = _load(k_head, rows, tail, stride, HEAD_DIM, HEAD_PAD)
            v_tail = _load(v_head, rows, tail, stride, HEAD_DIM, HEAD_PAD)
        acc, acc_tail, peak, total = _update(
            q, q_tail, k, k_tail, v, v_tail, acc, acc_tail, peak, total, (token <= last)[None, :], scale_log2,
            HAS_TAIL, MASKED, PRECISION,
        )  # fmt: skip
    return acc, acc_tail, peak, total


@triton.jit
def packed_kernel(
    q, k, v, cu_lens, out, scale_log2, q_stride, k_stride, v_stride, out_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head, every token of its segment visible; grid (tiles, q heads, segments).

    q, out   [tokens, q heads, HEAD_DIM], k, v [tokens, kv heads, HEAD_DIM]; heads and dims contiguous
    cu_lens  [segments + 1] int32
    """
    HAS_TAIL: tl.constexpr = HEAD_TAIL > 0
    head, segment = tl.program_id(1), tl.program_id(2)
    begin, end = tl.load(cu_lens + segment), tl.load(cu_lens + segment + 1)
    if begin + tl.program_id(0) * BLOCK_M >= end:
        return
    m = begin + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    main = tl.arange(0, HEAD_MAIN)
    tail = HEAD_MAIN + tl.arange(0, HEAD_TAIL if HAS_TAIL else HEAD_MAIN)
    main_real = (m < end)[:, None] & (main < HEAD_DIM)[None, :]
    tail_real = (m < end)[:, None] & (tail < HEAD_DIM)[None, :]
    q_rows = m.to(tl.int64)[:, None] * q_stride + head * HEAD_DIM
    q_main = tl.load(q + q_rows + main[None, :], mask=main_real, other=0.0)
    acc = tl.zeros([BLOCK_M, HEAD_MAIN], tl.float32)
    q_tail, acc_tail = q_main, acc
    if HAS_TAIL:
        q_tail = tl.load(q + q_rows + tail[None, :], mask=tail_real, other=0.0)
        acc_tail = tl.zeros([BLOCK_M, HEAD_TAIL], tl.float32)
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    k_head, v_head = k + head // GROUP * HEAD_DIM, v + head // GROUP * HEAD_DIM
    whole = begin + (end - begin) // BLOCK_N * BLOCK_N
    acc, acc_tail, peak, total = _packed_loop(
        q_main, q_tail, k_head, v_head, begin, whole, end - 1, k_stride, acc, acc_tail, peak, total, scale_log2,
        HEAD_DIM, HEAD_MAIN, HEAD_TAIL, BLOCK_N, False, PRECISION, NUM_STAGES,
    )  # fmt: skip
    if whole < end:
        acc, acc_tail, peak, total = _packed_loop(
            q_main, q_tail, k_head, v_head, whole, end, end - 1, k_stride, acc, acc_tail, peak, total, scale_log2,
            HEAD_DIM, HEAD_MAIN, HEAD_TAIL, BLOCK_N, True, PRECISION, NUM_STAGES,
        )  # fmt: skip
    out_rows = m.to(tl.int64)[:, None] * out_stride + head * HEAD_DIM
    tl.store(out + out_rows + main[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=main_real)
    if HAS_TAIL:
        tl.store(out + out_rows + tail[None, :], (acc_tail / total[:, None]).to(out.dtype.element_ty), mask=tail_real)


@dataclass(frozen=True)
class PrefillConfig:
    """How a prefill kernel is compiled."""

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 3
    tma: bool = False
    """Whether keys and values come by bulk tensor copies (pages of whole tiles)."""
    cut_head: bool = True
    """Whether a head dim that is no power of two is cut in two rather than padded to one."""

    def name(self) -> str:
        """A short label, unique among configurations."""
        extra = (" tma" if self.tma else "") + ("" if self.cut_head else " padded")
        return f"m{self.block_m} n{self.block_n} w{self.num_warps} st{self.num_stages}{extra}"


def head_parts(head_dim: int, cut: bool) -> tuple[int, int]:
    """(HEAD_MAIN, HEAD_TAIL): powers of two that cover head_dim; a tail of 0 means one padded part."""
    whole = max(16, triton.next_power_of_2(head_dim))
    main = whole // 2
    tail = max(16, triton.next_power_of_2(head_dim - main))
    return (main, tail) if cut and main >= 32 and tail < main else (whole, 0)


def _precision(dtype: torch.dtype) -> str:
    """fp32 inputs are multiplied in fp32, not tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def paged_prefill(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, cu_q_lens: Tensor, kv_lens: Tensor,
    max_q_len: int, scale: float, out: Tensor, config: PrefillConfig,
) -> None:  # fmt: skip
    """Causal attention over pages; shapes as in paged_prefill_kernel."""
    num_q_heads, head_dim = q.shape[1:]
    _, page_size, num_kv_heads, _ = k_pages.shape
    grid = (num_q_heads, kv_lens.numel(), triton.cdiv(max_q_len, config.block_m))
    shared = {
        "Q_HEADS": num_q_heads, "KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim, "PAGE_SIZE": page_size,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "PRECISION": _precision(q.dtype),
        "NUM_STAGES": config.num_stages, "num_warps": config.num_warps,
    }  # fmt: skip
    if config.tma:
        k_rows, v_rows = _descriptor(k_pages, config.block_n), _descriptor(v_pages, config.block_n)
        tma_prefill_kernel[grid](
            q, k_rows, v_rows, page_table, cu_q_lens, kv_lens, out, scale * LOG2_E, page_table.stride(0), **shared
        )
        return
    main, tail = head_parts(head_dim, config.cut_head)
    paged_prefill_kernel[grid](
        q, k_pages, v_pages, page_table, cu_q_lens, kv_lens, out, scale * LOG2_E, page_table.stride(0),
        HEAD_MAIN=main, HEAD_TAIL=tail, **shared,
    )  # fmt: skip


def _descriptor(pages: Tensor, block_n: int) -> object:
    """A host tensor descriptor over [pages * page_size, kv_heads * head_dim] with blocks of one head's tile."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    num_pages, page_size, num_kv_heads, head_dim = pages.shape
    if page_size % block_n or head_dim & (head_dim - 1):
        raise ValueError(f"no bulk copies for page size {page_size}, tiles of {block_n}, head dim {head_dim}")
    width = num_kv_heads * head_dim
    return TensorDescriptor(pages, [num_pages * page_size, width], [width, 1], [block_n, head_dim])


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_lens: Tensor, max_len: int, scale: float, out: Tensor, config: PrefillConfig
) -> None:
    """Attention without a mask within packed segments; shapes as in packed_kernel."""
    main, tail = head_parts(q.shape[2], config.cut_head)
    grid = (triton.cdiv(max_len, config.block_m), q.shape[1], cu_lens.numel() - 1)
    packed_kernel[grid](
        q, k, v, cu_lens, out, scale * LOG2_E, q.stride(0), k.stride(0), v.stride(0), out.stride(0),
        GROUP=q.shape[1] // k.shape[1], HEAD_DIM=q.shape[2], HEAD_MAIN=main, HEAD_TAIL=tail,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, PRECISION=_precision(q.dtype),
        NUM_STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
