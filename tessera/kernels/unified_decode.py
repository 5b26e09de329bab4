"""FlashDecoding++ (arXiv 2311.01282) over pages in Triton: softmax under one maximum that is known beforehand.

Instead of the greatest score seen so far every weight is taken relative to phi, one number for all rows, so that no
tile waits for another, nothing is rescaled, and parts of a sequence are merged by plain sums. It is right as long as
the greatest score of each row of a part lies near phi (`Unified`); a part where one does not is computed again by the
online softmax of `paged_decode`, and counted. Sequences are split evenly. Scores are in units of log2.
"""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.decode_attend import attend_tokens
from tessera.kernels.decode_merge import Workspace, out_rows
from tessera.kernels.decode_shares import Shares, own_span
from tessera.kernels.dependent import launch_constants, pdl_on, wait_for_launch
from tessera.kernels.launch import Launcher
from tessera.kernels.packed import UNALIGNED, load_part, log2_soft_cap, store_part
from tessera.kernels.paged_decode import Queries, constants
from tessera.kernels.scores import LOG2_E, Scores


class Unified(NamedTuple):
    """The one maximum, and where it serves."""

    phi: float
    """What weights are relative to, in units of the natural logarithm as scores are."""
    lowest: float
    """How far below phi the greatest score of a row may lie, negative, in units of log2."""
    highest: float
    """How far above, likewise."""


@triton.jit
def _attend_unified(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, table_row: tl.tensor, start: tl.tensor, end: tl.tensor,
    num_rows: tl.tensor, sink: tl.tensor, phi_log2: tl.tensor, scale_log2: tl.tensor, cap_log2: tl.tensor,
    k_stride: tl.tensor, v_stride: tl.tensor,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SOFT_CAP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Attention of q [ROWS, HEAD_PAD] over tokens start .. end, relative to phi: tiles share nothing but sums.

    sink     [ROWS], one score more without a token; -inf for none
    returns  acc [ROWS, HEAD_PAD] not yet divided, total [ROWS], and 1 if the greatest score of one of the first
             num_rows rows is too far from phi for these to be right, else 0
    """
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    totals = tl.zeros([ROWS, BLOCK_N], tl.float32)
    highest = tl.full([ROWS, BLOCK_N], float("-inf"), tl.float32)
    for first in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        # Slots past the last token may hold anything, even NaN, which no mask would undo: read the last instead.
        token = tl.minimum(first + tl.arange(0, BLOCK_N), end - 1)
        slot = tl.load(table_row + token // PAGE_SIZE).to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE
        keys = load_part(k, slot * k_stride, slot, 0, HEAD_PAD, HEAD_DIM, False)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale_log2
        if SOFT_CAP:
            scores = log2_soft_cap(scores, cap_log2)
        scores = tl.where((first + tl.arange(0, BLOCK_N) < end)[None, :], scores, float("-inf"))
        highest = tl.maximum(highest, scores)
        weights = tl.exp2(scores - phi_log2)
        totals += weights
        values = load_part(v, slot * v_stride, slot, 0, HEAD_PAD, HEAD_DIM, False)
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    total = tl.sum(totals, 1) + tl.exp2(sink - phi_log2)
    distance = tl.maximum(tl.max(highest, 1), sink) - phi_log2
    safe = (distance >= LOWEST) & (distance <= HIGHEST)  # not so where it is NaN
    unsafe = (tl.arange(0, ROWS) < num_rows) & (start < end) & (safe == 0)
    return acc, total, tl.max(unsafe.to(tl.int32), 0)


@triton.jit
def _merge_sums(
    out: tl.tensor, heads: tl.tensor, num_rows: tl.tensor, first_row: tl.tensor, part_out: tl.tensor,
    part_total: tl.tensor, part_peak: tl.tensor, first_part: tl.tensor, count: tl.tensor,
    RESCALE: tl.constexpr, GROUP: tl.constexpr, PART_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr, MERGE_ROWS: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """Add up parts first_part .. first_part + count, PARTS at a time; where RESCALE, each is relative to its own peak.

    With the totals' quotient that is the answer, which goes to out.
    """
    row, dim = tl.arange(0, MERGE_ROWS), tl.arange(0, HEAD_PAD)
    peak = tl.full([MERGE_ROWS], -1.0e30, tl.float32)
    total = tl.zeros([MERGE_ROWS], tl.float32)
    acc = tl.zeros([MERGE_ROWS, HEAD_PAD], tl.float32)
    for begin in range(0, count, PARTS):
        part = begin + tl.arange(0, PARTS)
        at = (first_part + part)[None, :] * PART_ROWS + row[:, None]
        real = (part < count)[None, :] & (row < num_rows)[:, None]
        # .cg: read from L2, where the other programs' results are; L1 may hold what stood here before.
        totals = tl.load(part_total + at, mask=real, other=0.0, cache_modifier=".cg")
        where = at[:, :, None] * HEAD_DIM + dim[None, None, :]
        mask = real[:, :, None] & (dim < HEAD_DIM)[None, None, :]
        values = tl.load(part_out + where, mask=mask, other=0.0, cache_modifier=".cg")
        if RESCALE:
            peaks = tl.load(part_peak + at, mask=real, other=float("-inf"), cache_modifier=".cg")
            new_peak = tl.maximum(peak, tl.max(peaks, 1))
            shrink, grow = tl.exp2(peak - new_peak), tl.exp2(peaks - new_peak[:, None])
            acc, total, peak = acc * shrink[:, None], total * shrink, new_peak
            values, totals = values * grow[:, :, None], totals * grow
        acc += tl.sum(values, 1)
        total += tl.sum(totals, 1)
    merged = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    rows = out_rows(first_row + row, heads, GROUP, HEAD_DIM)
    store_part(out, merged, rows, row < num_rows, 0, HEAD_PAD, HEAD_DIM)


@triton.jit
def _finish_sums(
    acc: tl.tensor, total: tl.tensor, peak: tl.tensor, unsafe: tl.tensor, part: tl.tensor, first_part: tl.tensor,
    num_parts: tl.tensor, counter: tl.tensor, out: tl.tensor, heads: tl.tensor, num_rows: tl.tensor,
    first_row: tl.tensor, part_out: tl.tensor, part_total: tl.tensor, part_peak: tl.tensor,
    GROUP: tl.constexpr, PART_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    ROWS: tl.constexpr, MERGE_ROWS: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """As `decode_merge.finish_part`, of sums that are not divided; if unsafe is 1, relative to a peak of their own."""
    row = tl.arange(0, ROWS)
    if num_parts <= 1:
        answer, rows = acc / tl.where(total > 0.0, total, 1.0)[:, None], (first_row + row) * HEAD_DIM
        store_part(out, answer, rows, row < num_rows, 0, HEAD_PAD, HEAD_DIM)
    else:
        written = part_out + part * (PART_ROWS * HEAD_DIM)
        store_part(written, acc, row * HEAD_DIM, row < num_rows, 0, HEAD_PAD, HEAD_DIM)
        tl.store(part_total + part * PART_ROWS + row, total, mask=row < num_rows)
        tl.store(part_peak + part * PART_ROWS + row, peak, mask=row < num_rows)
        tl.debug_barrier()  # every thread's share is written before this program says that it arrived
        # Who arrived in the lower half, in the upper how many of them are relative to peaks of their own.
        own = 1 + unsafe * 65536
        arrived = tl.atomic_add(counter, own, sem="acq_rel", scope="gpu") + own
        if arrived % 65536 == num_parts:
            tl.store(counter, 0)
            if arrived < 65536:
                _merge_sums(
                    out, heads, num_rows, first_row, part_out, part_total, part_peak, first_part, num_parts,
                    False, GROUP, PART_ROWS, HEAD_DIM, HEAD_PAD, MERGE_ROWS, PARTS,
                )  # fmt: skip
            else:
                _merge_sums(
                    out, heads, num_rows, first_row, part_out, part_total, part_peak, first_part, num_parts,
                    True, GROUP, PART_ROWS, HEAD_DIM, HEAD_PAD, MERGE_ROWS, PARTS,
                )  # fmt: skip


@triton.jit(
    do_not_specialize=["table_stride", "num_seqs", "num_splits", "min_split", "capacity"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def unified_decode_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, page_table: tl.tensor, kv_lens: tl.tensor, sinks: tl.tensor,
    out: tl.tensor, part_out: tl.tensor, part_total: tl.tensor, part_peak: tl.tensor, arrivals: tl.tensor,
    recomputed: tl.tensor, phi_log2: tl.tensor, scale_log2: tl.tensor, cap_log2: tl.tensor, q_stride: tl.tensor,
    k_stride: tl.tensor, v_stride: tl.tensor, table_stride: tl.tensor, num_seqs: tl.tensor, num_splits: tl.tensor,
    min_split: tl.tensor, capacity: tl.tensor, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    Q_HEAD_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr, V_HEAD_STRIDE: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, ROW_TILES: tl.constexpr, PART_ROWS: tl.constexpr,
    ROWS: tl.constexpr, MERGE_ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One split of one tile of rows of one key head of a sequence; grid (kv heads * ROW_TILES, splits, seqs)."""
    wait_for_launch(PDL)
    column = tl.program_id(0)
    kv_head, first_row = column // ROW_TILES, (column % ROW_TILES) * PART_ROWS
    seq, split, _, _, kv_len, oldest, start, size, first_part = own_span(
        kv_lens, kv_lens, num_seqs, num_splits, min_split, 1, WINDOW, 0, BLOCK_N
    )
    if (start >= kv_len) & (split > 0):
        return
    end = tl.minimum(start + size, kv_len)
    row = tl.arange(0, ROWS)
    num_rows = tl.minimum(GROUP - first_row, PART_ROWS)
    head = kv_head * GROUP + first_row + row
    q_tile = load_part(q + seq * q_stride, head * Q_HEAD_STRIDE, row < num_rows, 0, HEAD_PAD, HEAD_DIM, True)
    keys, values, table_row = k + kv_head * K_HEAD_STRIDE, v + kv_head * V_HEAD_STRIDE, page_table + seq * table_stride
    sink = tl.full([ROWS], float("-inf"), tl.float32)
    if SINKS:  # noqa: SIM102 -- known when compiled, the other is not
        if split == 0:  # a sink is one score more, which one split alone may count
            sink = tl.load(sinks + head, mask=row < num_rows, other=0.0) * 1.4426950408889634
    acc, total, unsafe = _attend_unified(
        q_tile, keys, values, table_row, start, end, num_rows, sink, phi_log2, scale_log2, cap_log2, k_stride, v_stride,
        LOWEST, HIGHEST, HEAD_DIM, HEAD_PAD, PAGE_SIZE, SOFT_CAP, ROWS, BLOCK_N, PRECISION, NUM_STAGES,
    )  # fmt: skip
    peak = tl.zeros([ROWS], tl.float32) + phi_log2
    if unsafe > 0:
        tl.atomic_add(recomputed, 1, sem="relaxed")
        acc, peak, total = attend_tokens(
            q_tile, keys, values, table_row, start, end, row, tl.maximum(sink, -1.0e30),
            (sink > float("-inf")).to(tl.float32), scale_log2, cap_log2, k_stride, v_stride, HEAD_DIM, HEAD_PAD,
            PAGE_SIZE, False, True, WINDOW, SOFT_CAP, ROWS, BLOCK_N, PRECISION, NUM_STAGES,
        )  # fmt: skip
    heads, num_parts = tl.num_programs(0) // ROW_TILES, tl.cdiv(kv_len - oldest, size)
    first_part = column.to(tl.int64) * capacity + first_part
    _finish_sums(
        acc, total, peak, unsafe, first_part + split, first_part, num_parts, arrivals + first_part,
        out + (seq * heads + kv_head) * (GROUP * HEAD_DIM), heads, num_rows, first_row, part_out, part_total, part_peak,
        GROUP, PART_ROWS, HEAD_DIM, HEAD_PAD, ROWS, MERGE_ROWS, PARTS,
    )  # fmt: skip


_launch_unified_decode = Launcher(unified_decode_kernel)


def unified_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    kv_lens: Tensor,
    page_table: Tensor,
    workspace: Workspace,
    shares: Shares,
    unified: Unified,
    scores: Scores,
    options: Mapping[str, int],
) -> Tensor:
    """Attend from each sequence's newest token to all of its tokens; zeros where there are none.

    q           [seqs, q_heads, head_dim], may be strided but for its last dimension
    shares      even ones, of one new token a sequence
    the rest    as `paged_decode`
    returns     [seqs, q_heads, head_dim]; workspace.recomputed grows by the parts that were computed again

    Launched dependently where `pdl_on`.
    """
    assert not shares.balanced and shares.max_q_len == 1
    out = q.new_empty(q.shape)
    compiled = constants(Queries.of(q, k.shape[2]), sinks is not None, scores, 1, options)
    del compiled["QUERIES"]
    _launch_unified_decode(
        (k.shape[2] * compiled["ROW_TILES"], shares.num_splits, len(kv_lens)),
        q, k, v, page_table, kv_lens, kv_lens if sinks is None else sinks, out,
        workspace.part_out, workspace.part_lse, workspace.part_peak, workspace.arrivals, workspace.recomputed,
        unified.phi * LOG2_E, *scores.log2, q.stride(0), k.stride(1), v.stride(1), page_table.stride(0),
        len(kv_lens), shares.num_splits, shares.min_split, shares.capacity(len(kv_lens)),
        LOWEST=unified.lowest, HIGHEST=unified.highest,
        K_HEAD_STRIDE=k.stride(2), V_HEAD_STRIDE=v.stride(2), PAGE_SIZE=k.shape[1], **compiled,
        **launch_constants(pdl_on(q.device)),
    )  # fmt: skip
    return out
