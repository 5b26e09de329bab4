"""What a program of a decode does with its tokens: scores, softmax and sum over one span of keys and values.

Shared by `paged_decode` and `unified_decode`. Scores are in units of log2.
"""

# ruff: noqa: N803, N806 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from tessera.kernels.dependent import prefetch
from tessera.kernels.packed import load_part, log2_soft_cap


@triton.jit
def visible_scores(
    q: tl.tensor, keys: tl.tensor, real: tl.tensor, token: tl.tensor, position: tl.tensor, scale_log2: tl.tensor,
    cap_log2: tl.tensor,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[ROWS, BLOCK_N] scores in units of log2, -inf where a query does not see a token or there is none (`real`)."""
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale_log2
    if SOFT_CAP:
        scores = log2_soft_cap(scores, cap_log2)
    visible = real[None, :]
    if MASKED:
        distance = position[:, None] - token[None, :]
        if CAUSAL:
            visible = visible & (distance >= 0)
        if WINDOW > 0:
            visible = visible & (distance < WINDOW) & (distance > -WINDOW)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def load_tokens(
    k: tl.tensor, v: tl.tensor, table_row: tl.tensor, token: tl.tensor, real: tl.tensor, k_stride: tl.tensor,
    v_stride: tl.tensor, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Keys and values of those tokens that are `real`, [BLOCK_N, HEAD_PAD] each, zeros for the others."""
    slot = tl.load(table_row + token // PAGE_SIZE, mask=real, other=0).to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE
    column = tl.arange(0, HEAD_PAD)[None, :]
    real = real[:, None] & (column < HEAD_DIM)
    # .cg: past L1, which may hold a line of before the wait in which a new token lies beside an old one.
    keys = tl.load(k + (slot * k_stride)[:, None] + column, mask=real, other=0.0, cache_modifier=".cg")
    return keys, tl.load(v + (slot * v_stride)[:, None] + column, mask=real, other=0.0, cache_modifier=".cg")


@triton.jit
def attend_block(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, token: tl.tensor, real: tl.tensor, position: tl.tensor,
    peak: tl.tensor, total: tl.tensor, scale_log2: tl.tensor, cap_log2: tl.tensor,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """`attend_tokens` over one block whose keys and values are there."""
    scores = visible_scores(
        q, keys, real, token, position, scale_log2, cap_log2, MASKED, CAUSAL, WINDOW, SOFT_CAP, PRECISION
    )
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    total = total * tl.exp2(peak - new_peak) + tl.sum(weights, 1)
    return tl.dot(weights.to(values.dtype), values, input_precision=PRECISION), new_peak, total


@triton.jit
def attend_tokens(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, table_row: tl.tensor, start: tl.tensor, end: tl.tensor,
    position: tl.tensor, peak: tl.tensor, total: tl.tensor, scale_log2: tl.tensor, cap_log2: tl.tensor,
    k_stride: tl.tensor, v_stride: tl.tensor,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Attention of q [ROWS, HEAD_PAD] over tokens start .. end.

    position  [ROWS] of each query, read where MASKED: where not all of them see all of these tokens
    returns   acc [ROWS, HEAD_PAD] not yet divided, peak [ROWS] in units of log2, total [ROWS]
    """
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for first in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        # Slots past the last token may hold anything, even NaN, which no mask would undo: read the last instead.
        token = tl.minimum(first + tl.arange(0, BLOCK_N), end - 1)
        slot = tl.load(table_row + token // PAGE_SIZE).to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE
        keys = load_part(k, slot * k_stride, slot, 0, HEAD_PAD, HEAD_DIM, False)
        lane = first + tl.arange(0, BLOCK_N)
        scores = visible_scores(
            q, keys, lane < end, token, position, scale_log2, cap_log2, MASKED, CAUSAL, WINDOW, SOFT_CAP, PRECISION
        )
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        values = load_part(v, slot * v_stride, slot, 0, HEAD_PAD, HEAD_DIM, False)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@triton.jit
def begin_sums(
    sinks: tl.tensor, head: tl.tensor, real: tl.tensor, first: tl.tensor, ROWS: tl.constexpr, SINKS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Peak and total of no score yet, [ROWS] each; in the first split a sink is one score already."""
    peak = tl.full([ROWS], -1.0e30, tl.float32)  # not -inf: the difference of two would be NaN
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:  # noqa: SIM102 -- known when compiled, the other is not
        if first:
            sink = tl.load(sinks + head, mask=real, other=0.0) * 1.4426950408889634
            peak = tl.maximum(peak, sink)  # one of -inf has no weight
            total += 1.0
    return peak, total


@triton.jit
def prefetch_tokens(
    k: tl.tensor, v: tl.tensor, table_row: tl.tensor, start: tl.tensor, end: tl.tensor, k_stride: tl.tensor,
    v_stride: tl.tensor, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Have the first keys and values of tokens start .. end brought nearer; k and v at slot 0 of their head."""
    WIDTH: tl.constexpr = HEAD_DIM * k.dtype.element_ty.primitive_bitwidth // 8
    LINES: tl.constexpr = triton.next_power_of_2((WIDTH + 127) // 128)
    token = tl.minimum(start + tl.arange(0, BLOCK_N), tl.maximum(end - 1, 0))
    slot = tl.load(table_row + token // PAGE_SIZE).to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE
    column = tl.minimum(tl.arange(0, LINES) * (128 * HEAD_DIM // WIDTH), HEAD_DIM - 1)
    prefetch(k + (slot * k_stride)[:, None] + column[None, :])
    prefetch(v + (slot * v_stride)[:, None] + column[None, :])


@triton.jit
def read_old(
    k: tl.tensor, v: tl.tensor, table_row: tl.tensor, start: tl.tensor, end: tl.tensor, first_new: tl.tensor,
    k_stride: tl.tensor, v_stride: tl.tensor, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """What may be done about tokens start .. end before the wait for the kernel before, which writes the new ones.

    Where EARLY, keys and values of the one block of those before `first_new`, [BLOCK_N, HEAD_PAD] each, zeros for the
    others: in registers, not on their way when the wait is over. Else nothing that is read.
    """
    if EARLY:
        token = start + tl.arange(0, BLOCK_N)
        known = token < tl.minimum(end, first_new)
        keys, values = load_tokens(k, v, table_row, token, known, k_stride, v_stride, HEAD_DIM, HEAD_PAD, PAGE_SIZE)
    else:
        if PDL:
            prefetch_tokens(k, v, table_row, start, end, k_stride, v_stride, HEAD_DIM, PAGE_SIZE, BLOCK_N)
        keys, values = start, start
    return keys, values


@triton.jit
def begin_rows(
    q: tl.tensor, sinks: tl.tensor, kv_head: tl.tensor, first_row: tl.tensor, num_rows: tl.tensor, first: tl.tensor,
    q_stride: tl.tensor, Q_HEAD_STRIDE: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr, ROWS: tl.constexpr, SINKS: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Rows of a tile, each a query of the sequence at q and a head of the group: number of its query [ROWS], the
    queries [ROWS, HEAD_PAD], peak and total of no score yet [ROWS]; num_rows of them are real.
    """
    row = tl.arange(0, ROWS)
    query, head = (first_row + row) // GROUP, kv_head * GROUP + (first_row + row) % GROUP
    q_rows = query.to(tl.int64) * q_stride + head * Q_HEAD_STRIDE
    q_tile = load_part(q, q_rows, row < num_rows, 0, HEAD_PAD, HEAD_DIM, True)
    peak, total = begin_sums(sinks, head, row < num_rows, first, ROWS, SINKS)
    return query, q_tile, peak, total


@triton.jit
def attend_span(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, keys: tl.tensor, values: tl.tensor, table_row: tl.tensor,
    start: tl.tensor, end: tl.tensor, first_new: tl.tensor, query: tl.tensor, peak: tl.tensor, total: tl.tensor,
    scale_log2: tl.tensor, cap_log2: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr, EARLY: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """`attend_tokens`; where EARLY of one block, whose old keys and values `read_old` has read."""
    if EARLY:
        token = start + tl.arange(0, BLOCK_N)
        fresh = (token >= first_new) & (token < end)
        new_keys, new_values = load_tokens(
            k, v, table_row, token, fresh, k_stride, v_stride, HEAD_DIM, HEAD_PAD, PAGE_SIZE
        )
        acc, peak, total = attend_block(
            q, tl.where(fresh[:, None], new_keys, keys), tl.where(fresh[:, None], new_values, values), token,
            token < end, first_new + query, peak, total, scale_log2, cap_log2,
            MASKED, CAUSAL, WINDOW, SOFT_CAP, PRECISION,
        )  # fmt: skip
    else:
        acc, peak, total = attend_tokens(
            q, k, v, table_row, start, end, first_new + query, peak, total, scale_log2, cap_log2, k_stride, v_stride,
            HEAD_DIM, HEAD_PAD, PAGE_SIZE, MASKED, CAUSAL, WINDOW, SOFT_CAP, ROWS, BLOCK_N, PRECISION, NUM_STAGES,
        )  # fmt: skip
    return acc, peak, total


@triton.jit
def attend_rows(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, keys: tl.tensor, values: tl.tensor, table_row: tl.tensor,
    sinks: tl.tensor, start: tl.tensor, end: tl.tensor, first_new: tl.tensor, kv_head: tl.tensor, first_row: tl.tensor,
    num_rows: tl.tensor, is_first: tl.tensor, scale_log2: tl.tensor, cap_log2: tl.tensor, q_stride: tl.tensor,
    k_stride: tl.tensor, v_stride: tl.tensor, Q_HEAD_STRIDE: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr, EARLY: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """A tile of rows of the sequence at q over tokens start .. end of it: answers [ROWS, HEAD_PAD], log2 of their sums.

    k, v          at slot 0 of the key head
    keys, values  as `read_old` returned them, where EARLY
    first_new     position of the first query
    is_first      whether these are the sequence's first tokens, where sinks are counted
    """
    query, q_tile, peak, total = begin_rows(
        q, sinks, kv_head, first_row, num_rows, is_first, q_stride, Q_HEAD_STRIDE, GROUP, HEAD_DIM, HEAD_PAD, ROWS,
        SINKS,
    )  # fmt: skip
    acc, peak, total = attend_span(
        q_tile, k, v, keys, values, table_row, start, end, first_new, query, peak, total, scale_log2, cap_log2,
        k_stride, v_stride, HEAD_DIM, HEAD_PAD, PAGE_SIZE, QUERIES > 1, CAUSAL, WINDOW, SOFT_CAP, ROWS, BLOCK_N,
        PRECISION, NUM_STAGES, EARLY,
    )  # fmt: skip
    divisor = tl.where(total > 0.0, total, 1.0)
    return acc / divisor[:, None], peak + tl.log2(divisor)
