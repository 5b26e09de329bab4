"""Decode over pages in Triton: split-KV Flash-Decoding (Dao et al. 2023), the merge fused into the same kernel.

One program attends for one key-value head of one sequence over one span of its tokens. The query heads that
share the key head are the rows of its tile, padded to the 16 that tensor cores take. A sequence's tokens are
shared evenly among `num_splits` programs, and those left with nothing return at once: the grid depends on no
length, so a CUDA graph may replay it with any. Whichever program of a sequence finishes last merges the parts
by log-sum-exp. Scores are in units of log2.
"""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.packed import UNALIGNED, load_part, log2_soft_cap, store_part
from tessera.kernels.scores import Scores


@dataclass(frozen=True)
class Workspace:
    """Memory for the parts of sequences that are split; the arrivals are all 0 between launches."""

    part_out: Tensor
    """[parts, group, head_dim] float32"""
    part_lse: Tensor
    """[parts, group] float32"""
    arrivals: Tensor
    """[parts] int32, of which one a sequence and key head is used"""

    @classmethod
    def allocate(cls, parts: int, group: int, head_dim: int, device: str) -> Workspace:
        """Room for so many parts: sequences * key heads * splits, wherever there is more than one split."""
        return cls(
            torch.empty(parts, group, head_dim, dtype=torch.float32, device=device),
            torch.empty(parts, group, dtype=torch.float32, device=device),
            torch.zeros(parts, dtype=torch.int32, device=device),
        )


@triton.jit
def _attend_span(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, table_row: tl.tensor, start: tl.tensor, end: tl.tensor,
    peak: tl.tensor, total: tl.tensor, scale_log2: tl.tensor, cap_log2: tl.tensor, k_stride: tl.tensor,
    v_stride: tl.tensor,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr, SOFT_CAP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Attention of q [ROWS, HEAD_PAD] over tokens start .. end.

    returns  acc [ROWS, HEAD_PAD] not yet divided, peak [ROWS] in units of log2, total [ROWS]
    """
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for first in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        # Slots past the last token may hold anything, even NaN, which no mask would undo: read the last instead.
        token = tl.minimum(first + tl.arange(0, BLOCK_N), end - 1)
        slot = tl.load(table_row + token // PAGE_SIZE).to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE
        keys = load_part(k, slot * k_stride, slot, 0, HEAD_PAD, HEAD_DIM, False)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale_log2
        if SOFT_CAP:
            scores = log2_soft_cap(scores, cap_log2)
        scores = tl.where((first + tl.arange(0, BLOCK_N) < end)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        values = load_part(v, slot * v_stride, slot, 0, HEAD_PAD, HEAD_DIM, False)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@triton.jit
def _merge_parts(
    out: tl.tensor, part_out: tl.tensor, part_lse: tl.tensor, first_part: tl.tensor, count: tl.tensor,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, MERGE_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """Merge parts first_part .. first_part + count by log-sum-exp into out [GROUP, HEAD_DIM], PARTS at a time."""
    row, dim = tl.arange(0, MERGE_ROWS), tl.arange(0, HEAD_PAD)
    peak = tl.full([MERGE_ROWS], -1.0e30, tl.float32)
    total = tl.zeros([MERGE_ROWS], tl.float32)
    acc = tl.zeros([MERGE_ROWS, HEAD_PAD], tl.float32)
    for begin in range(0, count, PARTS):
        part = begin + tl.arange(0, PARTS)
        at = (first_part + part)[None, :] * GROUP + row[:, None]
        real = (part < count)[None, :] & (row < GROUP)[:, None]
        # .cg: read from L2, where the other programs' results are; L1 may hold what stood here before.
        lse = tl.load(part_lse + at, mask=real, other=float("-inf"), cache_modifier=".cg")
        where = at[:, :, None] * HEAD_DIM + dim[None, None, :]
        mask = real[:, :, None] & (dim < HEAD_DIM)[None, None, :]
        values = tl.load(part_out + where, mask=mask, other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(lse, 1))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(lse - new_peak[:, None])
        acc = acc * shrink[:, None] + tl.sum(values * weights[:, :, None], 1)
        total = total * shrink + tl.sum(weights, 1)
        peak = new_peak
    merged = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    store_part(out, merged, row * HEAD_DIM, row < GROUP, 0, HEAD_PAD, HEAD_DIM)


@triton.jit
def _finish_part(
    values: tl.tensor, lse: tl.tensor, part: tl.tensor, first_part: tl.tensor, num_parts: tl.tensor,
    arrived: tl.tensor, out: tl.tensor, part_out: tl.tensor, part_lse: tl.tensor,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr,
    MERGE_ROWS: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """Write one part down, and merge them all if the others have been written."""
    row = tl.arange(0, ROWS)
    store_part(part_out + part * (GROUP * HEAD_DIM), values, row * HEAD_DIM, row < GROUP, 0, HEAD_PAD, HEAD_DIM)
    tl.store(part_lse + part * GROUP + row, lse, mask=row < GROUP)
    tl.debug_barrier()  # every thread's share is written before this program says that it arrived
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
        tl.store(arrived, 0)
        _merge_parts(out, part_out, part_lse, first_part, num_parts, GROUP, HEAD_DIM, HEAD_PAD, MERGE_ROWS, PARTS)


@triton.jit(do_not_specialize=["table_stride", "num_splits", "min_split"], do_not_specialize_on_alignment=UNALIGNED)
def paged_decode_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, page_table: tl.tensor, kv_lens: tl.tensor, sinks: tl.tensor,
    out: tl.tensor, part_out: tl.tensor, part_lse: tl.tensor, arrivals: tl.tensor, scale_log2: tl.tensor,
    cap_log2: tl.tensor, q_stride: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor, table_stride: tl.tensor,
    num_splits: tl.tensor, min_split: tl.tensor,
    Q_HEAD_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr, V_HEAD_STRIDE: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr,
    MERGE_ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """One split of one key head of one sequence; grid (kv heads, splits, seqs). Shapes as `paged_decode`."""
    kv_head, split, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_len = tl.load(kv_lens + seq)
    oldest = tl.maximum(kv_len - WINDOW, 0) if WINDOW > 0 else kv_len * 0
    size = tl.maximum(tl.cdiv(tl.cdiv(kv_len - oldest, num_splits), BLOCK_N) * BLOCK_N, min_split)
    start = oldest + split * size
    if (start >= kv_len) & (split > 0):
        return
    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    q_tile = load_part(q + seq * q_stride, head * Q_HEAD_STRIDE, row < GROUP, 0, HEAD_PAD, HEAD_DIM, True)
    peak = tl.full([ROWS], -1.0e30, tl.float32)  # not -inf: the difference of two would be NaN
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:  # noqa: SIM102 -- known when compiled, the other is not
        if split == 0:  # a sink is one score more, which one split alone may count
            peak = tl.load(sinks + head, mask=row < GROUP, other=0.0) * 1.4426950408889634
            total += 1.0
    acc, peak, total = _attend_span(
        q_tile, k + kv_head * K_HEAD_STRIDE, v + kv_head * V_HEAD_STRIDE, page_table + seq * table_stride,
        start, tl.minimum(start + size, kv_len), peak, total, scale_log2, cap_log2, k_stride, v_stride,
        HEAD_DIM, HEAD_PAD, PAGE_SIZE, SOFT_CAP, ROWS, BLOCK_N, PRECISION, NUM_STAGES,
    )  # fmt: skip
    divisor = tl.where(total > 0.0, total, 1.0)
    values = acc / divisor[:, None]
    pair = seq * tl.num_programs(0) + kv_head
    target = out + pair * (GROUP * HEAD_DIM)
    if kv_len - oldest <= size:
        store_part(target, values, row * HEAD_DIM, row < GROUP, 0, HEAD_PAD, HEAD_DIM)
        return
    _finish_part(
        values, peak + tl.log2(divisor), pair * num_splits + split, pair * num_splits,
        tl.cdiv(kv_len - oldest, size), arrivals + pair, target, part_out, part_lse,
        GROUP, HEAD_DIM, HEAD_PAD, ROWS, MERGE_ROWS, PARTS,
    )  # fmt: skip


def paged_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    kv_lens: Tensor,
    page_table: Tensor,
    workspace: Workspace,
    num_splits: int,
    min_split: int,
    scores: Scores,
    options: Mapping[str, int],
) -> Tensor:
    """Attend from each sequence's newest token to all of its tokens; zeros where there are none.

    q           [seqs, q_heads, head_dim], may be strided but for its last dimension
    k, v        [pages, page_size, kv_heads, head_dim], each page contiguous, pages one behind the other
    sinks       [q_heads] float32
    kv_lens     [seqs] int32
    page_table  [seqs, max_pages] int32, contiguous rows
    workspace   room for seqs * kv_heads * num_splits parts, unless num_splits is 1
    min_split   fewest tokens a split, so that short sequences are not cut up
    options     BLOCK_N, NUM_STAGES, num_warps
    returns     [seqs, q_heads, head_dim]
    """
    out = q.new_empty(q.shape)
    num_kv_heads, head_dim = k.shape[2], k.shape[3]
    pad, merge_rows = triton.next_power_of_2(head_dim), triton.next_power_of_2(q.shape[1] // num_kv_heads)
    paged_decode_kernel[(num_kv_heads, num_splits, len(q))](
        q, k, v, page_table, kv_lens, kv_lens if sinks is None else sinks, out,
        workspace.part_out, workspace.part_lse, workspace.arrivals,
        *scores.log2, q.stride(0), k.stride(1), v.stride(1),
        page_table.stride(0), num_splits, min_split,
        Q_HEAD_STRIDE=q.stride(1), K_HEAD_STRIDE=k.stride(2), V_HEAD_STRIDE=v.stride(2),
        GROUP=q.shape[1] // num_kv_heads, HEAD_DIM=head_dim, HEAD_PAD=pad, PAGE_SIZE=k.shape[1],
        WINDOW=scores.window or 0, SOFT_CAP=scores.soft_cap is not None, SINKS=sinks is not None,
        ROWS=max(16, merge_rows), MERGE_ROWS=merge_rows,
        PARTS=max(1, min(16, 2048 * options["num_warps"] // (merge_rows * pad))),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **options,
    )  # fmt: skip
    return out
