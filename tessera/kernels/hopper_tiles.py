"""Pieces of `hopper_prefill.py`: which keys a tile sees, and one tile's way in, through the softmax and out.

Four warps work on 64 rows, a row being a query and a head of the group that shares a key head.
"""

# ruff: noqa: N803, SIM102 -- what is compiled in is written in capitals, and its conditions stand apart
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

_copy_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # by Triton's version


@gluon.jit
def find_tile(
    number: gl.tensor, cu_q_lens: gl.tensor, kv_lens: gl.tensor, tiles: gl.tensor, HEADS: gl.constexpr,
    GROUP: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """The key head, sequence and first row of a tile, its sequence's lengths, and the tiles of keys that it sees."""
    seq = gl.load(tiles + 2 * (number // HEADS))
    row = gl.load(tiles + 2 * (number // HEADS) + 1) * ROWS
    begin = gl.load(cu_q_lens + seq)
    q_len = gl.load(cu_q_lens + seq + 1) - begin
    kv_len = gl.load(kv_lens + seq)
    last = kv_len - q_len + gl.minimum((row + ROWS - 1) // GROUP, q_len - 1)
    end = gl.minimum(kv_len, last + 1) if CAUSAL else (gl.minimum(kv_len, last + WINDOW) if WINDOW > 0 else kv_len)
    low = gl.maximum(kv_len - q_len + row // GROUP - WINDOW + 1, 0) // BLOCK_N if WINDOW > 0 else seq * 0
    return number % HEADS, seq, row, begin, q_len, kv_len, low, gl.maximum(gl.cdiv(end, BLOCK_N) - 1, low)


@gluon.jit
def copy_tile(
    desc: tma.tensor_descriptor, smem: gl.shared_memory_descriptor, ready: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor, table_row: gl.tensor, column: gl.tensor, first: gl.tensor,
    kv_len: gl.tensor, stage: gl.tensor, phase: gl.tensor, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr, BOX: gl.constexpr,
) -> None:  # fmt: skip
    """Start copying the tokens first .. first + BLOCK_N, a page or BOX tokens of one at a time, once `smem` is free."""
    mbarrier.wait(free.index(stage), phase ^ 1)
    mbarrier.expect(ready.index(stage), BLOCK_N * HEAD_DIM * 2)
    for part in gl.static_range(BLOCK_N // BOX):
        # Past the last token the last page is copied again: as many bytes must come as are expected.
        token = gl.minimum(first + part * BOX, gl.maximum(kv_len - 1, 0) // BOX * BOX)
        slot = gl.load(table_row + token // PAGE_SIZE) * PAGE_SIZE + token % PAGE_SIZE
        box = smem.index(stage).slice(part * BOX, BOX, 0)
        _copy_box(desc, [slot, column], ready.index(stage), box)


@gluon.jit
def load_queries(
    q: gl.tensor, number: gl.tensor, num_tiles: gl.tensor, where: gl.tuple, PART: gl.constexpr,
    Q_HEAD_STRIDE: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The rows [BLOCK_M, HEAD_DIM] of one group of warps, zeros past the last; of the last tile if there is none.

    where  cu_q_lens, tiles, q_stride
    """
    cu_q_lens, tiles, q_stride = where
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [4, 1], [1, 0])
    number = gl.minimum(number, num_tiles - 1)
    seq = gl.load(tiles + 2 * (number // HEADS))
    begin = gl.load(cu_q_lens + seq)
    q_len = gl.load(cu_q_lens + seq + 1) - begin
    row = gl.load(tiles + 2 * (number // HEADS) + 1) * ROWS + PART * BLOCK_M
    rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    head = number % HEADS * GROUP + rows % GROUP
    starts = (begin + rows // GROUP).to(gl.int64) * q_stride + head * Q_HEAD_STRIDE
    pointers = q + starts[:, None] + gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))[None, :]
    return gl.load(pointers, mask=(rows // GROUP < q_len)[:, None], other=0.0)


@gluon.jit
def begin_softmax(
    sinks: gl.tensor, head: gl.tensor, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SINKS: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """The peak and the total of rows of these heads before any key is seen: the sinks alone."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
    peak = gl.full([BLOCK_M], -1.0e30, gl.float32, layout)  # not -inf: the difference of two would be NaN
    total = gl.zeros([BLOCK_M], gl.float32, layout)
    if SINKS:
        peak = gl.load(sinks + head) * 1.4426950408889634
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
    """Zero the values that no token holds, 16 at a time; both groups of warps write the same."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [4, 1], [1, 0])
    for part in gl.static_range(BLOCK_N // 16):
        if first + part * 16 + 16 > kv_len:
            piece = smem.slice(part * 16, 16, 0)
            real = first + part * 16 + gl.arange(0, 16, gl.SliceLayout(1, layout)) < kv_len
            values = piece.load(layout)
            piece.store(gl.where(real[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
def store_rows(
    out: gl.tensor, values: gl.tensor, row: gl.tensor, kv_head: gl.tensor, begin: gl.tensor, q_len: gl.tensor,
    out_stride: gl.tensor, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr,
) -> None:  # fmt: skip
    """Write rows back to where their heads lie."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [4, 1], [1, 0])
    rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    starts = (begin + rows // GROUP).to(gl.int64) * out_stride + (kv_head * GROUP + rows % GROUP) * HEAD_DIM
    pointers = out + starts[:, None] + gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))[None, :]
    stored = gl.convert_layout(values.to(out.dtype.element_ty), layout)
    gl.store(pointers, stored, mask=(rows // GROUP < q_len)[:, None])
