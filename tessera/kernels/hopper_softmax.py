"""Pieces of `hopper_prefill.py` that compute: products with keys, masks, the online softmax, values without tokens."""

# ruff: noqa: N803, SIM102 -- what is compiled in is written in capitals, and its conditions stand apart
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma


@gluon.jit
def multiply_keys(
    q_main: gl.shared_memory_descriptor, q_tail: gl.shared_memory_descriptor, k_main: gl.shared_memory_descriptor,
    k_tail: gl.shared_memory_descriptor, TAIL: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The scores of one tile, on their way."""
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
    pending = warpgroup_mma(q_main, k_main.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if TAIL > 0:
        pending = warpgroup_mma(q_tail, k_tail.permute((1, 0)), pending, is_async=True)
    return pending


@gluon.jit
def begin_softmax(
    sinks: gl.tensor, head: gl.tensor, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SINKS: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """The peak and the total of rows of these heads before any key is seen: the sinks alone."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
    peak = gl.full([BLOCK_M], -1.0e30, gl.float32, layout)  # not -inf: the difference of two would be NaN
    total = gl.zeros([BLOCK_M], gl.float32, layout)
    if SINKS:
        peak = gl.maximum(peak, gl.load(sinks + head) * 1.4426950408889634)  # one of -inf has no weight
        total += 1.0
    return peak, total


@gluon.jit
def softmax(
    scores: gl.tensor, peak: gl.tensor, total: gl.tensor, rate: gl.tensor,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """Weights of one tile by the online softmax: weights, new peak, new total, and what older sums shrink by."""
    new_peak = gl.maximum(peak, gl.max(scores, 1) * rate)
    weights = gl.exp2(scores * rate - new_peak[:, None])
    shrink = gl.exp2(peak - new_peak)
    return weights, new_peak, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def mask(
    scores: gl.tensor, token: gl.tensor, position: gl.tensor, kv_len: gl.tensor, first: gl.tensor,
    low: gl.tensor, high: gl.tensor, scale_log2: gl.tensor, cap_log2: gl.tensor, LAST: gl.constexpr,
    BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Soft cap, then masks, where a row at positions low .. high does not see every token of the tile.

    LAST  whether tokens past the sequence's end may be in it
    """
    if SOFT_CAP:  # cap * tanh(score / cap) in units of log2, see `packed.log2_soft_cap`
        scores = cap_log2 - 2.0 * cap_log2 / (1.0 + gl.exp2(scores * (scale_log2 * 2.8853900817779268 / cap_log2)))
    if LAST:
        scores = gl.where(token < kv_len, scores, float("-inf"))
    if CAUSAL:
        if first + BLOCK_N - 1 > low:
            scores = gl.where(token <= position, scores, float("-inf"))
    if WINDOW > 0:
        if (first <= high - WINDOW) | (first + BLOCK_N - 1 >= low + WINDOW):
            near = (position - token < WINDOW) & (token - position < WINDOW)
            scores = gl.where(near, scores, float("-inf"))
    return scores


@gluon.jit
def clear_values(
    smem: gl.shared_memory_descriptor, first: gl.tensor, kv_len: gl.tensor, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
) -> None:  # fmt: skip
    """Zero the values that no token holds, 16 at a time; all warpgroups write the same."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [4, 1], [1, 0])
    for part in gl.static_range(BLOCK_N // 16):
        if first + part * 16 + 16 > kv_len:
            piece = smem.slice(part * 16, 16, 0)
            real = first + part * 16 + gl.arange(0, 16, gl.SliceLayout(1, layout)) < kv_len
            values = piece.load(layout)
            piece.store(gl.where(real[:, None], values, gl.zeros_like(values)))


@gluon.jit
def as_operand(weights: gl.tensor, WIDTH: gl.constexpr) -> gl.tensor:
    """Weights as the left side of a product with values of so many columns."""
    return gl.convert_layout(
        weights, gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16]), 2)
    )


@gluon.jit
def scale_rows(sums: gl.tensor, factor: gl.tensor, WIDTH: gl.constexpr) -> gl.tensor:
    """Each row of sums times its factor."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16]))
    return sums * gl.convert_layout(factor, layout)[:, None]
