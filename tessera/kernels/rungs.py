"""What the prefill kernels before FlashAttention-2 share: one query head's tile of scores, every key masked.

They exist to be compared with `packed.py`, which packs the query heads of a group into one tile and masks only where
it must; that is left out here on purpose. Scores are in units of log2, as there.
"""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from tessera.kernels.packed import load_part, log2_soft_cap


@triton.jit
def seen_keys(
    first: tl.tensor, last: tl.tensor, kv_len: tl.tensor, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """(start, end) of the keys that any query at positions first .. last sees."""
    start = tl.maximum(first - WINDOW + 1, 0) if WINDOW > 0 else first * 0
    end = tl.minimum(last + 1 if CAUSAL else (last + WINDOW if WINDOW > 0 else kv_len), kv_len)
    return start, end


@triton.jit
def find_slots(table_row: tl.tensor, token: tl.tensor, kv_len: tl.tensor, PAGE_SIZE: tl.constexpr) -> tl.tensor:
    """Where tokens [n] of a sequence lie, int64: in the pool, or where PAGE_SIZE is 0, behind its first token."""
    # Slots past the last token may hold anything, even NaN, which no mask would undo: read the last instead.
    slot = tl.minimum(token, kv_len - 1).to(tl.int64)
    if PAGE_SIZE > 0:
        slot = tl.load(table_row + slot // PAGE_SIZE).to(tl.int64) * PAGE_SIZE + slot % PAGE_SIZE
    return slot


@triton.jit
def score_tile(
    q: tl.tensor, q_tail: tl.tensor, k: tl.tensor, k_tail: tl.tensor, position: tl.tensor, token: tl.tensor,
    kv_len: tl.tensor, scale_log2: tl.tensor, cap_log2: tl.tensor,
    HAS_TAIL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Scores of queries at `position` [BLOCK_M] and keys of `token` [BLOCK_N], -inf where one does not see the other.

    q        [BLOCK_M, HEAD_MAIN]     q_tail  [BLOCK_M, HEAD_TAIL]
    k        [BLOCK_N, HEAD_MAIN]     k_tail  [BLOCK_N, HEAD_TAIL]
    returns  [BLOCK_M, BLOCK_N] float32, in units of log2
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_TAIL:
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
    scores = scores * scale_log2
    if SOFT_CAP:
        scores = log2_soft_cap(scores, cap_log2)
    distance = position[:, None] - token[None, :]
    visible = (distance >= 0 if CAUSAL else distance > -kv_len) & (token < kv_len)[None, :]
    if WINDOW > 0:
        visible = visible & (distance < WINDOW) & (distance > -WINDOW)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def load_both(
    base: tl.tensor, rows: tl.tensor, real: tl.tensor,
    HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr, MASK_ROWS: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """The main part and the tail of rows, see `load_part`; without a tail the main part twice."""
    main = load_part(base, rows, real, 0, HEAD_MAIN, HEAD_DIM, MASK_ROWS)
    tail = main
    if HEAD_TAIL > 0:
        tail = load_part(base, rows, real, HEAD_MAIN, HEAD_TAIL, HEAD_DIM, MASK_ROWS)
    return main, tail


@triton.jit
def begin_rows(sink: tl.tensor, SINKS: tl.constexpr, BLOCK_M: tl.constexpr) -> tuple[tl.tensor, ...]:
    """(maximum, sum) [BLOCK_M] of a softmax that nothing has joined yet but the head's sink, where SINKS."""
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)  # not -inf: the difference of two would be NaN
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        peak = tl.maximum(peak, tl.load(sink) * 1.4426950408889634)
        total += 1.0
    return peak, total
