"""FlashAttention-2 (Dao 2023) in Triton: one program takes one tile of queries of one key-value head.

The query heads that share a key head lie in one tile, so its keys are read once for all of them, and a short
chunk of queries still fills it. Keys that every query of a tile sees are gone through without masks. Heads that
are no power of two are cut into HEAD_MAIN + HEAD_TAIL (80 = 64 + 16): little is computed on padding. Scores are
in units of log2, for `exp2` is what the hardware has. `packed_kernel` reads keys that lie one after another;
`paged_prefill.py` builds on the same functions.
"""

# ruff: noqa: N803, N806 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.launch import Launcher
from tessera.kernels.scores import Scores

UNALIGNED = ["page_table", "cu_q_lens", "kv_lens", "tiles", "sinks"]  # begin anywhere, are read number by number


@triton.jit
def log2_soft_cap(scores: tl.tensor, cap_log2: tl.tensor) -> tl.tensor:
    """`cap * tanh(score / cap)`, all in units of log2."""
    # tanh(x) = 1 - 2 / (1 + exp(2 x)); 2.885... is 2 log2(e). Where exp2 overflows, the quotient is 0 as it should be.
    return cap_log2 - 2.0 * cap_log2 / (1.0 + tl.exp2(scores * (2.8853900817779268 / cap_log2)))


@triton.jit
def load_part(
    base: tl.tensor, rows: tl.tensor, real: tl.tensor,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Columns FIRST .. FIRST + WIDTH of rows that begin at base + rows [n]: [n, WIDTH], zeros past HEAD_DIM.

    real  [n] bool: rows to be read, where MASK_ROWS; the others are zeros
    """
    column = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] + column[None, :]
    if MASK_ROWS:
        return tl.load(pointers, mask=real[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    if FIRST + WIDTH > HEAD_DIM:
        return tl.load(pointers, mask=(column < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _attend_tile(
    q: tl.tensor, q_tail: tl.tensor, k: tl.tensor, k_tail: tl.tensor, v: tl.tensor, v_tail: tl.tensor,
    acc: tl.tensor, acc_tail: tl.tensor, peak: tl.tensor, total: tl.tensor, visible: tl.tensor,
    scale_log2: tl.tensor, cap_log2: tl.tensor,
    HAS_TAIL: tl.constexpr, MASKED: tl.constexpr, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """One step of the online softmax.

    q        [BLOCK_M, HEAD_MAIN]     q_tail          [BLOCK_M, HEAD_TAIL]
    k, v     [BLOCK_N, HEAD_MAIN]     k_tail, v_tail  [BLOCK_N, HEAD_TAIL]
    visible  [BLOCK_M, BLOCK_N] bool, read where MASKED
    returns  acc, acc_tail, peak [BLOCK_M] in units of log2, total [BLOCK_M]
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_TAIL:
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
    rate = 1.0 if SOFT_CAP else scale_log2
    if SOFT_CAP:
        scores = log2_soft_cap(scores * scale_log2, cap_log2)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * rate)
    weights = tl.exp2(scores * rate - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(v.dtype)
    acc = tl.dot(weights, v, acc * shrink[:, None], input_precision=PRECISION)
    if HAS_TAIL:
        acc_tail = tl.dot(weights, v_tail, acc_tail * shrink[:, None], input_precision=PRECISION)
    return acc, acc_tail, new_peak, total


@triton.jit
def _attend_span(
    q: tl.tensor, q_tail: tl.tensor, k: tl.tensor, v: tl.tensor, table_row: tl.tensor, start: tl.tensor,
    end: tl.tensor, kv_len: tl.tensor, position: tl.tensor, acc: tl.tensor, acc_tail: tl.tensor, peak: tl.tensor,
    total: tl.tensor, scale_log2: tl.tensor, cap_log2: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor,
    HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr, PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Go through the keys of tokens start .. end, whole tiles of them. position [BLOCK_M, 1]: of each query."""
    HAS_TAIL: tl.constexpr = HEAD_TAIL > 0
    for first in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        token = first + tl.arange(0, BLOCK_N)
        # Slots past the last token may hold anything, even NaN, which no mask would undo: read the last instead.
        slot = tl.minimum(token, kv_len - 1) if MASKED else token
        if PAGE_SIZE > 0:
            slot = tl.load(table_row + slot // PAGE_SIZE).to(tl.int64) * PAGE_SIZE + slot % PAGE_SIZE
        k_rows, v_rows = slot.to(tl.int64) * k_stride, slot.to(tl.int64) * v_stride
        k_main = load_part(k, k_rows, slot, 0, HEAD_MAIN, HEAD_DIM, False)
        v_main = load_part(v, v_rows, slot, 0, HEAD_MAIN, HEAD_DIM, False)
        k_tail, v_tail = k_main, v_main
        if HAS_TAIL:
            k_tail = load_part(k, k_rows, slot, HEAD_MAIN, HEAD_TAIL, HEAD_DIM, False)
            v_tail = load_part(v, v_rows, slot, HEAD_MAIN, HEAD_TAIL, HEAD_DIM, False)
        distance = position - token[None, :]
        visible = (distance >= 0 if CAUSAL else distance > -kv_len) & (token < kv_len)[None, :]
        if WINDOW > 0:
            visible = visible & (distance < WINDOW) & (distance > -WINDOW)
        acc, acc_tail, peak, total = _attend_tile(
            q, q_tail, k_main, k_tail, v_main, v_tail, acc, acc_tail, peak, total, visible, scale_log2, cap_log2,
            HAS_TAIL, MASKED, SOFT_CAP, PRECISION,
        )  # fmt: skip
    return acc, acc_tail, peak, total


@triton.jit
def _cut_keys(
    first: tl.tensor, last: tl.tensor, kv_len: tl.tensor, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Cut the keys that queries at positions first .. last see into masked, unmasked and masked tiles.

    returns  start, low, high, end: [low, high) is seen by every query; low and high are whole tiles from start
    """
    start = tl.maximum(first - WINDOW + 1, 0) if WINDOW > 0 else first * 0
    end = tl.minimum(last + 1 if CAUSAL else (last + WINDOW if WINDOW > 0 else kv_len), kv_len)
    seen_from = tl.maximum(last - WINDOW + 1, 0) if WINDOW > 0 else start
    seen_to = tl.minimum(first + 1 if CAUSAL else (first + WINDOW if WINDOW > 0 else kv_len), kv_len)
    low = start + tl.cdiv(tl.maximum(seen_from - start, 0), BLOCK_N) * BLOCK_N
    high = low + tl.maximum(seen_to - low, 0) // BLOCK_N * BLOCK_N
    return start, low, high, end


@triton.jit
def _attend_keys(
    q: tl.tensor, q_tail: tl.tensor, k: tl.tensor, v: tl.tensor, table_row: tl.tensor, first: tl.tensor,
    last: tl.tensor, kv_len: tl.tensor, position: tl.tensor, acc: tl.tensor, acc_tail: tl.tensor, peak: tl.tensor,
    total: tl.tensor, scale_log2: tl.tensor, cap_log2: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor,
    HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr, PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """All keys that queries at positions first .. last see, masked only where one of them does not see all."""
    start, low, high, end = _cut_keys(first, last, kv_len, CAUSAL, WINDOW, BLOCK_N)
    if WINDOW > 0:
        acc, acc_tail, peak, total = _attend_span(
            q, q_tail, k, v, table_row, start, tl.minimum(low, end), kv_len, position, acc, acc_tail, peak, total,
            scale_log2, cap_log2, k_stride, v_stride, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, PAGE_SIZE,
            CAUSAL, WINDOW, SOFT_CAP, BLOCK_N, True, PRECISION, NUM_STAGES,
        )  # fmt: skip
    acc, acc_tail, peak, total = _attend_span(
        q, q_tail, k, v, table_row, low, high, kv_len, position, acc, acc_tail, peak, total,
        scale_log2, cap_log2, k_stride, v_stride, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, PAGE_SIZE,
        CAUSAL, WINDOW, SOFT_CAP, BLOCK_N, False, PRECISION, NUM_STAGES,
    )  # fmt: skip
    acc, acc_tail, peak, total = _attend_span(
        q, q_tail, k, v, table_row, high, end, kv_len, position, acc, acc_tail, peak, total,
        scale_log2, cap_log2, k_stride, v_stride, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, PAGE_SIZE,
        CAUSAL, WINDOW, SOFT_CAP, BLOCK_N, True, PRECISION, NUM_STAGES,
    )  # fmt: skip
    return acc, acc_tail, peak, total


@triton.jit
def attend_queries(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, table_row: tl.tensor, sinks: tl.tensor, out: tl.tensor,
    q_len: tl.tensor, kv_len: tl.tensor, tile: tl.tensor, kv_head: tl.tensor, scale_log2: tl.tensor,
    cap_log2: tl.tensor, q_stride: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor, out_stride: tl.tensor,
    Q_HEAD_STRIDE: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr,
    HEAD_TAIL: tl.constexpr, PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Attend for one tile of one sequence: rows are (query, head of the group), heads fastest.

    q, out     at the sequence's first query
    k, v       at this key head of the pool's slot 0, or where PAGE_SIZE is 0, of the sequence's first token
    """
    HAS_TAIL: tl.constexpr = HEAD_TAIL > 0
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head, real = row // GROUP, kv_head * GROUP + row % GROUP, row < q_len * GROUP
    q_rows = token.to(tl.int64) * q_stride + head * Q_HEAD_STRIDE
    q_main = load_part(q, q_rows, real, 0, HEAD_MAIN, HEAD_DIM, True)
    acc = tl.zeros([BLOCK_M, HEAD_MAIN], tl.float32)
    q_tail, acc_tail = q_main, acc
    if HAS_TAIL:
        q_tail = load_part(q, q_rows, real, HEAD_MAIN, HEAD_TAIL, HEAD_DIM, True)
        acc_tail = tl.zeros([BLOCK_M, HEAD_TAIL], tl.float32)
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)  # not -inf: the difference of two would be NaN
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        peak = tl.maximum(peak, tl.load(sinks + head) * 1.4426950408889634)  # one of -inf has no weight
        total += 1.0
    old = kv_len - q_len
    first, last = old + tile * BLOCK_M // GROUP, old + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, q_len - 1)
    acc, acc_tail, peak, total = _attend_keys(
        q_main, q_tail, k, v, table_row, first, last, kv_len, (old + token)[:, None], acc, acc_tail, peak, total,
        scale_log2, cap_log2, k_stride, v_stride, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, PAGE_SIZE,
        CAUSAL, WINDOW, SOFT_CAP, BLOCK_N, PRECISION, NUM_STAGES,
    )  # fmt: skip
    divisor = tl.where(total > 0.0, total, 1.0)[:, None]
    out_rows = token.to(tl.int64) * out_stride + head * HEAD_DIM
    store_part(out, acc / divisor, out_rows, real, 0, HEAD_MAIN, HEAD_DIM)
    if HAS_TAIL:
        store_part(out, acc_tail / divisor, out_rows, real, HEAD_MAIN, HEAD_TAIL, HEAD_DIM)


@triton.jit
def store_part(
    base: tl.tensor, values: tl.tensor, rows: tl.tensor, real: tl.tensor,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
) -> None:  # fmt: skip
    """Write `values` [n, WIDTH] where `load_part` would read them."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = real[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(base + rows[:, None] + column[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def packed_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, cu_q_lens: tl.tensor, tiles: tl.tensor, sinks: tl.tensor,
    out: tl.tensor, scale_log2: tl.tensor, cap_log2: tl.tensor, q_stride: tl.tensor, k_stride: tl.tensor,
    v_stride: tl.tensor, out_stride: tl.tensor,
    Q_HEAD_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr, V_HEAD_STRIDE: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of one sequence, every key of it visible; grid (kv heads, tiles). Shapes as `packed_attention`."""
    kv_head = tl.program_id(0)
    seq, tile = tl.load(tiles + 2 * tl.program_id(1)), tl.load(tiles + 2 * tl.program_id(1) + 1)
    begin = tl.load(cu_q_lens + seq).to(tl.int64)
    length = tl.load(cu_q_lens + seq + 1) - begin.to(tl.int32)
    attend_queries(
        q + begin * q_stride, k + begin * k_stride + kv_head * K_HEAD_STRIDE,
        v + begin * v_stride + kv_head * V_HEAD_STRIDE, tiles, sinks, out + begin * out_stride,
        length, length, tile, kv_head, scale_log2, cap_log2, q_stride, k_stride, v_stride, out_stride,
        Q_HEAD_STRIDE, GROUP, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, 0, False, WINDOW, SOFT_CAP, SINKS,
        BLOCK_M, BLOCK_N, PRECISION, NUM_STAGES,
    )  # fmt: skip


_launch_packed = Launcher(packed_kernel)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_q_lens: Tensor,
    tiles: Tensor,
    scores: Scores,
    options: Mapping[str, int],
) -> Tensor:
    """Attend within packed sequences, both ways.

    q          [tokens, q_heads, head_dim], may be strided but for its last dimension
    k, v       [tokens, kv_heads, head_dim], likewise
    sinks      [q_heads] float32
    cu_q_lens  [seqs + 1] int32
    tiles      [n, 2] int32: (sequence, tile of its BLOCK_M rows; a row is a query and a head of a group), all once
    options    BLOCK_M, BLOCK_N, NUM_STAGES, num_warps
    returns    [tokens, q_heads, head_dim]
    """
    out = q.new_empty(q.shape)
    _launch_packed(
        (k.shape[1], len(tiles)), q, k, v, cu_q_lens, tiles, cu_q_lens if sinks is None else sinks, out, *scores.log2,
        q.stride(0), k.stride(0), v.stride(0), out.stride(0),
        K_HEAD_STRIDE=k.stride(1), V_HEAD_STRIDE=v.stride(1), **constants(q, k.shape[1], sinks, scores), **options,
    )  # fmt: skip
    return out


def constants(q: Tensor, heads: int, sinks: Tensor | None, scores: Scores) -> dict[str, Any]:
    """The compile-time arguments that the kernels share; `heads` are those of the keys."""
    main, tail = head_parts(q.shape[2])
    return {  # head strides, for 72 is known to be a multiple of 8 only then, and loads to be aligned
        "Q_HEAD_STRIDE": q.stride(1),
        "GROUP": q.shape[1] // heads,
        "HEAD_DIM": q.shape[2],
        "HEAD_MAIN": main,
        "HEAD_TAIL": tail,
        "WINDOW": scores.window or 0,
        "SOFT_CAP": scores.soft_cap is not None,
        "SINKS": sinks is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # which only float32 heeds
    }


def head_parts(head_dim: int) -> tuple[int, int]:
    """(HEAD_MAIN, HEAD_TAIL): powers of two that cover `head_dim`; a tail of 0 means one part, padded or not."""
    main = triton.next_power_of_2(head_dim) // 2
    tail = max(16, triton.next_power_of_2(head_dim - main))
    return (main, tail) if 32 <= main > tail else (2 * main, 0)
