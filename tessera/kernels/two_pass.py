"""The naive fused prefill in Triton: scores never reach global memory, and there is no online softmax.

One program takes one tile of queries of one head and goes through its keys twice: first for the maximum and the sum of
each row's softmax, then, with both known, for the weighted values. So q·k is multiplied twice and keys are read twice.
"""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.packed import UNALIGNED, constants, store_part
from tessera.kernels.rungs import begin_rows, find_slots, load_both, score_tile, seen_keys
from tessera.kernels.scores import Scores


@triton.jit
def _sum_up(
    q: tl.tensor, q_tail: tl.tensor, k: tl.tensor, table_row: tl.tensor, start: tl.tensor, end: tl.tensor,
    position: tl.tensor, kv_len: tl.tensor, peak: tl.tensor, total: tl.tensor, scale_log2: tl.tensor,
    cap_log2: tl.tensor, k_stride: tl.tensor,
    HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr, PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """The first pass over keys start .. end: (peak, total) [BLOCK_M], the maximum and the sum of each row's softmax."""
    for key in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        token = key + tl.arange(0, BLOCK_N)
        k_rows = find_slots(table_row, token, kv_len, PAGE_SIZE) * k_stride
        k_main, k_tail = load_both(k, k_rows, k_rows, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, False)
        scores = score_tile(
            q, q_tail, k_main, k_tail, position, token, kv_len, scale_log2, cap_log2,
            HEAD_TAIL > 0, CAUSAL, WINDOW, SOFT_CAP, PRECISION,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(scores - new_peak[:, None]), 1)
        peak = new_peak
    return peak, total


@triton.jit
def _weigh(
    q: tl.tensor, q_tail: tl.tensor, k: tl.tensor, v: tl.tensor, table_row: tl.tensor, start: tl.tensor,
    end: tl.tensor, position: tl.tensor, kv_len: tl.tensor, peak: tl.tensor, acc: tl.tensor, acc_tail: tl.tensor,
    scale_log2: tl.tensor, cap_log2: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor,
    HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr, PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """The second pass over keys start .. end: their values under known maxima, added to acc and acc_tail."""
    for key in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        token = key + tl.arange(0, BLOCK_N)
        slot = find_slots(table_row, token, kv_len, PAGE_SIZE)
        k_main, k_tail = load_both(k, slot * k_stride, slot, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, False)
        v_main, v_tail = load_both(v, slot * v_stride, slot, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, False)
        scores = score_tile(
            q, q_tail, k_main, k_tail, position, token, kv_len, scale_log2, cap_log2,
            HEAD_TAIL > 0, CAUSAL, WINDOW, SOFT_CAP, PRECISION,
        )  # fmt: skip
        weights = tl.exp2(scores - peak[:, None]).to(v_main.dtype)
        acc = tl.dot(weights, v_main, acc, input_precision=PRECISION)
        if HEAD_TAIL > 0:
            acc_tail = tl.dot(weights, v_tail, acc_tail, input_precision=PRECISION)
    return acc, acc_tail


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=UNALIGNED)
def two_pass_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, page_table: tl.tensor, cu_q_lens: tl.tensor, kv_lens: tl.tensor,
    sinks: tl.tensor, out: tl.tensor, scale_log2: tl.tensor, cap_log2: tl.tensor, q_stride: tl.tensor,
    k_stride: tl.tensor, v_stride: tl.tensor, out_stride: tl.tensor, table_stride: tl.tensor,
    Q_HEAD_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr, V_HEAD_STRIDE: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr,
    PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of one sequence's new tokens; grid (tiles of the longest, q heads, seqs). Shapes as `two_pass`."""
    tile, head, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_q_lens + seq).to(tl.int64)
    q_len, kv_len = tl.load(cu_q_lens + seq + 1) - begin.to(tl.int32), tl.load(kv_lens + seq)
    if tile * BLOCK_M >= q_len:
        return
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real, position = row < q_len, kv_len - q_len + row
    q_rows = (begin + row) * q_stride + head * Q_HEAD_STRIDE
    q_main, q_tail = load_both(q, q_rows, real, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, True)
    first = kv_len - q_len + tile * BLOCK_M
    start, end = seen_keys(first, tl.minimum(first + BLOCK_M, kv_len) - 1, kv_len, CAUSAL, WINDOW)
    table_row, skipped = page_table + seq.to(tl.int64) * table_stride, 0 if PAGE_SIZE > 0 else begin
    k_head = k + skipped * k_stride + head // GROUP * K_HEAD_STRIDE
    v_head = v + skipped * v_stride + head // GROUP * V_HEAD_STRIDE
    peak, total = begin_rows(sinks + head, SINKS, BLOCK_M)
    peak, total = _sum_up(
        q_main, q_tail, k_head, table_row, start, end, position, kv_len, peak, total, scale_log2, cap_log2, k_stride,
        HEAD_DIM, HEAD_MAIN, HEAD_TAIL, PAGE_SIZE, CAUSAL, WINDOW, SOFT_CAP, BLOCK_N, PRECISION, NUM_STAGES,
    )  # fmt: skip
    acc = tl.zeros([BLOCK_M, HEAD_MAIN], tl.float32)
    acc_tail = tl.zeros([BLOCK_M, HEAD_TAIL if HEAD_TAIL > 0 else 16], tl.float32)
    acc, acc_tail = _weigh(
        q_main, q_tail, k_head, v_head, table_row, start, end, position, kv_len, peak, acc, acc_tail,
        scale_log2, cap_log2, k_stride, v_stride,
        HEAD_DIM, HEAD_MAIN, HEAD_TAIL, PAGE_SIZE, CAUSAL, WINDOW, SOFT_CAP, BLOCK_N, PRECISION, NUM_STAGES,
    )  # fmt: skip
    divisor = tl.where(total > 0.0, total, 1.0)[:, None]
    out_rows = (begin + row) * out_stride + head * HEAD_DIM
    store_part(out, acc / divisor, out_rows, real, 0, HEAD_MAIN, HEAD_DIM)
    if HEAD_TAIL > 0:
        store_part(out, acc_tail / divisor, out_rows, real, HEAD_MAIN, HEAD_TAIL, HEAD_DIM)


def two_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_q_lens: Tensor,
    kv_lens: Tensor,
    page_table: Tensor,
    max_q_len: int,
    causal: bool,
    scores: Scores,
    options: Mapping[str, int],
) -> Tensor:
    """Attend from each sequence's last tokens to all of its tokens.

    q           [tokens, q_heads, head_dim], may be strided but for its last dimension
    k, v        [pages, page_size, kv_heads, head_dim], each page contiguous, pages one behind the other; or packed
                like q, [tokens, kv_heads, head_dim], where `page_table` is not read
    sinks       [q_heads] float32
    cu_q_lens   [seqs + 1] int32
    kv_lens     [seqs] int32
    page_table  [seqs, max_pages] int32, contiguous rows
    max_q_len   of any sequence
    options     BLOCK_M, BLOCK_N, NUM_STAGES, num_warps
    returns     [tokens, q_heads, head_dim]
    """
    out = q.new_empty(q.shape)
    grid = (triton.cdiv(max_q_len, options["BLOCK_M"]), q.shape[1], len(kv_lens))
    two_pass_kernel[grid](
        q, k, v, page_table, cu_q_lens, kv_lens, kv_lens if sinks is None else sinks, out, *scores.log2,
        q.stride(0), k.stride(-3), v.stride(-3), out.stride(0), page_table.stride(0),
        K_HEAD_STRIDE=k.stride(-2), V_HEAD_STRIDE=v.stride(-2), PAGE_SIZE=k.shape[1] if k.ndim == 4 else 0,
        CAUSAL=causal, **constants(q, k.shape[-2], sinks, scores), **options,
    )  # fmt: skip
    return out
