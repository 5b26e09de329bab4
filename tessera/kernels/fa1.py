"""FlashAttention (Dao et al. 2022, arXiv 2205.14135, Algorithm 1) in Triton: the online softmax, keys outside.

One program takes one head of one sequence. It goes through tiles of keys, and for each of them through all tiles of
queries; what a query has gathered (answer, maximum, sum) lies in global memory, is read, rescaled and written again at
every step. FlashAttention-2 turns the loops round, keeps all that in registers, and makes a program of every tile.
"""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.packed import UNALIGNED, constants, store_part
from tessera.kernels.rungs import begin_rows, find_slots, load_both, score_tile, seen_keys
from tessera.kernels.scores import Scores


class State(NamedTuple):
    """What queries have gathered so far, in global memory; a call leaves nothing in it that the next one reads."""

    answers: Tensor
    """[tokens, q_heads, head_dim] float32, divided by `totals` at every step, as in the algorithm"""
    peaks: Tensor
    """[tokens, q_heads] float32: greatest scores, in units of log2"""
    totals: Tensor
    """[tokens, q_heads] float32: sums of weights"""

    @classmethod
    def allocate(cls, tokens: int, q_heads: int, head_dim: int, device: str | torch.device) -> State:
        """For a step of so many new tokens."""
        answers = torch.empty(tokens, q_heads, head_dim, dtype=torch.float32, device=device)
        peaks, totals = (torch.empty(tokens, q_heads, dtype=torch.float32, device=device) for _ in range(2))
        return cls(answers, peaks, totals)


@triton.jit
def _begin(
    answers: tl.tensor, peaks: tl.tensor, totals: tl.tensor, sinks: tl.tensor, own: tl.tensor, q_len: tl.tensor,
    head: tl.tensor, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr,
    SINKS: tl.constexpr, BLOCK_M: tl.constexpr,
) -> None:  # fmt: skip
    """Line 2 of the algorithm: nothing gathered yet, in the rows that begin at `own`."""
    for tile in range(tl.cdiv(q_len, BLOCK_M)):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        real, at = row < q_len, own + row.to(tl.int64) * HEADS
        peak, total = begin_rows(sinks + head, SINKS, BLOCK_M)
        tl.store(peaks + at, peak, mask=real)
        tl.store(totals + at, total, mask=real)
        store_part(answers, tl.zeros([BLOCK_M, HEAD_MAIN], tl.float32), at * HEAD_DIM, real, 0, HEAD_MAIN, HEAD_DIM)
        if HEAD_TAIL > 0:
            tail = tl.zeros([BLOCK_M, HEAD_TAIL], tl.float32)
            store_part(answers, tail, at * HEAD_DIM, real, HEAD_MAIN, HEAD_TAIL, HEAD_DIM)


@triton.jit
def _finish(
    answers: tl.tensor, out: tl.tensor, own: tl.tensor, q_len: tl.tensor, out_stride: tl.tensor,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:  # fmt: skip
    """The answers of the rows that begin at `own`, in the type of `out`, which is at the sequence's first of them."""
    for tile in range(tl.cdiv(q_len, BLOCK_M)):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        real, at = row < q_len, own + row.to(tl.int64) * HEADS
        acc, acc_tail = load_both(answers, at * HEAD_DIM, real, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, True)
        store_part(out, acc, row.to(tl.int64) * out_stride, real, 0, HEAD_MAIN, HEAD_DIM)
        if HEAD_TAIL > 0:
            store_part(out, acc_tail, row.to(tl.int64) * out_stride, real, HEAD_MAIN, HEAD_TAIL, HEAD_DIM)


@triton.jit
def _seeing_tiles(
    first: tl.tensor, num_tiles: tl.tensor,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """(low, high): the tiles of queries of which one sees a tile of keys, which begins `first` after the new tokens."""
    low, high = num_tiles * 0, num_tiles
    if CAUSAL:
        low = tl.maximum(first, 0) // BLOCK_M
    elif WINDOW > 0:
        low = tl.maximum(first - WINDOW + 1, 0) // BLOCK_M
    if WINDOW > 0:
        high = tl.minimum(num_tiles, tl.cdiv(tl.maximum(first + BLOCK_N - 1 + WINDOW, 0), BLOCK_M))
    return low, high


@triton.jit
def _visit_queries(
    q: tl.tensor, k_main: tl.tensor, k_tail: tl.tensor, v_main: tl.tensor, v_tail: tl.tensor, answers: tl.tensor,
    peaks: tl.tensor, totals: tl.tensor, low: tl.tensor, high: tl.tensor, own: tl.tensor, old: tl.tensor,
    q_len: tl.tensor, kv_len: tl.tensor, token: tl.tensor, scale_log2: tl.tensor, cap_log2: tl.tensor,
    q_stride: tl.tensor,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Lines 8 to 13 of the algorithm: one tile of keys for the tiles low .. high of queries, each rescaled."""
    for tile in tl.range(low, high, num_stages=NUM_STAGES):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        real, at = row < q_len, own + row.to(tl.int64) * HEADS
        q_rows, rows = row.to(tl.int64) * q_stride, at * HEAD_DIM
        q_main, q_tail = load_both(q, q_rows, real, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, True)
        scores = score_tile(
            q_main, q_tail, k_main, k_tail, old + row, token, kv_len, scale_log2, cap_log2,
            HEAD_TAIL > 0, CAUSAL, WINDOW, SOFT_CAP, PRECISION,
        )  # fmt: skip
        peak = tl.load(peaks + at, mask=real, other=0.0)
        total = tl.load(totals + at, mask=real, other=0.0)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights, kept = tl.exp2(scores - new_peak[:, None]), total * tl.exp2(peak - new_peak)
        total = kept + tl.sum(weights, 1)
        weights, divisor = weights.to(v_main.dtype), tl.where(total > 0.0, total, 1.0)[:, None]
        acc, acc_tail = load_both(answers, rows, real, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, True)
        # Several threads may have read the same number: none of them writes before all have.
        tl.debug_barrier()
        acc = tl.dot(weights, v_main, acc * kept[:, None], input_precision=PRECISION) / divisor
        store_part(answers, acc, rows, real, 0, HEAD_MAIN, HEAD_DIM)
        if HEAD_TAIL > 0:
            acc_tail = tl.dot(weights, v_tail, acc_tail * kept[:, None], input_precision=PRECISION) / divisor
            store_part(answers, acc_tail, rows, real, HEAD_MAIN, HEAD_TAIL, HEAD_DIM)
        tl.store(peaks + at, new_peak, mask=real)
        tl.store(totals + at, total, mask=real)


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=UNALIGNED)
def fa1_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, page_table: tl.tensor, cu_q_lens: tl.tensor, kv_lens: tl.tensor,
    sinks: tl.tensor, answers: tl.tensor, peaks: tl.tensor, totals: tl.tensor, out: tl.tensor, scale_log2: tl.tensor,
    cap_log2: tl.tensor, q_stride: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor, out_stride: tl.tensor,
    table_stride: tl.tensor,
    HEADS: tl.constexpr, Q_HEAD_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr, V_HEAD_STRIDE: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr,
    PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """One sequence's new tokens in one head; grid (q heads, seqs). Shapes as `fa1`; HEADS are those of q."""
    head, seq = tl.program_id(0), tl.program_id(1)
    begin = tl.load(cu_q_lens + seq).to(tl.int64)
    q_len, kv_len = tl.load(cu_q_lens + seq + 1) - begin.to(tl.int32), tl.load(kv_lens + seq)
    old, num_tiles = kv_len - q_len, tl.cdiv(q_len, BLOCK_M)
    table_row, skipped = page_table + seq.to(tl.int64) * table_stride, 0 if PAGE_SIZE > 0 else begin
    k_head = k + skipped * k_stride + head // GROUP * K_HEAD_STRIDE
    v_head = v + skipped * v_stride + head // GROUP * V_HEAD_STRIDE
    q_head, out_head = q + begin * q_stride + head * Q_HEAD_STRIDE, out + begin * out_stride + head * HEAD_DIM
    own = begin * HEADS + head  # of this head's first row in peaks, totals and answers

    _begin(answers, peaks, totals, sinks, own, q_len, head, HEADS, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, SINKS, BLOCK_M)
    start, end = seen_keys(old, kv_len - 1, kv_len, CAUSAL, WINDOW)
    for key in range(start, end, BLOCK_N):
        # What another thread of the program wrote at the last tile of keys is read at this one.
        tl.debug_barrier()
        token = key + tl.arange(0, BLOCK_N)
        slot = find_slots(table_row, token, kv_len, PAGE_SIZE)
        k_main, k_tail = load_both(k_head, slot * k_stride, slot, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, False)
        v_main, v_tail = load_both(v_head, slot * v_stride, slot, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, False)
        low, high = _seeing_tiles(key - old, num_tiles, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
        _visit_queries(
            q_head, k_main, k_tail, v_main, v_tail, answers, peaks, totals, low, high, own, old, q_len, kv_len, token,
            scale_log2, cap_log2, q_stride, HEADS, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, CAUSAL, WINDOW, SOFT_CAP,
            BLOCK_M, PRECISION, NUM_STAGES,
        )  # fmt: skip
    tl.debug_barrier()
    _finish(answers, out_head, own, q_len, out_stride, HEADS, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, BLOCK_M)


def fa1(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_q_lens: Tensor,
    kv_lens: Tensor,
    page_table: Tensor,
    state: State,
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
    state       for as many tokens as q has; what is in it does not matter
    options     BLOCK_M, BLOCK_N, NUM_STAGES, num_warps
    returns     [tokens, q_heads, head_dim]
    """
    out = q.new_empty(q.shape)
    fa1_kernel[(q.shape[1], len(kv_lens))](
        q, k, v, page_table, cu_q_lens, kv_lens, kv_lens if sinks is None else sinks, *state, out, *scores.log2,
        q.stride(0), k.stride(-3), v.stride(-3), out.stride(0), page_table.stride(0), HEADS=q.shape[1],
        K_HEAD_STRIDE=k.stride(-2), V_HEAD_STRIDE=v.stride(-2), PAGE_SIZE=k.shape[1] if k.ndim == 4 else 0,
        CAUSAL=causal, **constants(q, k.shape[-2], sinks, scores), **options,
    )  # fmt: skip
    return out
