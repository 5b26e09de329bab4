"""Prefill over pages for Hopper GPUs, in Gluon: what FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608) does there.

One warp copies tiles of keys and values from their pages into shared memory by TMA and runs ahead, over the
borders of tiles of queries too. Two groups of four warps each take 64 rows, a row being a query and a head of the
group that shares a key head; while the tensor cores multiply the weights of one tile of keys with its values, the
softmax of the next is computed. Tiles of keys are taken from the last to the first, for masks are at the end.

Rows of keys that no token holds may be anything, NaN too: their scores are masked, their values are set to zero.
"""

# ruff: noqa: N803, N806 -- what is compiled in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tessera.kernels.hopper_tiles import (
    begin_softmax,
    clear_values,
    copy_tile,
    find_tile,
    load_queries,
    mask,
    softmax,
    store_rows,
)
from tessera.kernels.scores import Scores

BLOCK_M = 64
"""Rows of one group of warps: what one instruction multiplies."""
ROWS = 2 * BLOCK_M
"""Rows of a tile."""
STAGES = 2


def block_n(head_dim: int) -> int:
    """Tokens of a tile of keys: as many as fit into registers and shared memory."""
    return 128 if head_dim <= 128 else 64


@gluon.jit
def _make_barriers(COUNT: gl.constexpr, STAGES: gl.constexpr) -> gl.shared_memory_descriptor:
    """One barrier a stage, passed when COUNT have arrived."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=COUNT)
    return barriers


@gluon.jit
def _produce(
    k_desc: tma.tensor_descriptor, v_desc: tma.tensor_descriptor, ring: gl.tuple, page_table: gl.tensor,
    table_stride: gl.tensor, cu_q_lens: gl.tensor, kv_lens: gl.tensor, tiles: gl.tensor, num_tiles: gl.tensor,
    HEADS: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
) -> None:  # fmt: skip
    """Keys and values of every tile of this program, in the order in which `_consume` wants them."""
    k_smem, v_smem, k_ready, v_ready, k_free, v_free = ring
    count = 0
    for number in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        kv_head, seq, _row, _begin, _q_len, kv_len, low, high = find_tile(
            number, cu_q_lens, kv_lens, tiles, HEADS, GROUP, ROWS, BLOCK_N, CAUSAL, WINDOW
        )
        table_row = page_table + seq.to(gl.int64) * table_stride
        for index in range(high - low + 1):
            stage, phase, first = count % STAGES, (count // STAGES) & 1, (high - index) * BLOCK_N
            copy_tile(
                k_desc, k_smem, k_ready, k_free, table_row, kv_head * HEAD_DIM, first, kv_len, stage, phase,
                HEAD_DIM, BLOCK_N, PAGE_SIZE, BOX,
            )  # fmt: skip
            copy_tile(
                v_desc, v_smem, v_ready, v_free, table_row, kv_head * HEAD_DIM, first, kv_len, stage, phase,
                HEAD_DIM, BLOCK_N, PAGE_SIZE, BOX,
            )  # fmt: skip
            count += 1


@gluon.jit
def _attend_first(
    q_smem: gl.shared_memory_descriptor, ring: gl.tuple, position: gl.tensor, kv_len: gl.tensor, low: gl.tensor,
    high: gl.tensor, tile: gl.tensor, peak: gl.tensor, total: gl.tensor, count: gl.tensor, scale_log2: gl.tensor,
    cap_log2: gl.tensor, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """The weights of the last tile of keys, with the peak and the total; values past the sequence's end are cleared."""
    k_smem, v_smem, k_ready, v_ready, k_free, _v_free = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    stage, phase, first = count % STAGES, (count // STAGES) & 1, tile * BLOCK_N
    mbarrier.wait(k_ready.index(stage), phase)
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    pending = warpgroup_mma(q_smem, k_smem.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [pending])
    mbarrier.arrive(k_free.index(stage), count=1)
    token = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))[None, :] + first
    scores = mask(
        scores, token, position, kv_len, first, low, high, scale_log2, cap_log2, True, BLOCK_N, CAUSAL, WINDOW,
        SOFT_CAP,
    )  # fmt: skip
    weights, peak, total, _shrink = softmax(scores, peak, total, 1.0 if SOFT_CAP else scale_log2)
    if first + BLOCK_N > kv_len:
        mbarrier.wait(v_ready.index(stage), phase)
        clear_values(v_smem.index(stage), first, kv_len, HEAD_DIM, BLOCK_N)
    return gl.convert_layout(weights.to(q_smem.dtype), gl.DotOperandLayout(0, sums_layout, 2)), peak, total


@gluon.jit
def _attend_rest(
    q_smem: gl.shared_memory_descriptor, ring: gl.tuple, weights: gl.tensor, position: gl.tensor, kv_len: gl.tensor,
    low: gl.tensor, high: gl.tensor, tile: gl.tensor, num_tiles: gl.tensor, peak: gl.tensor, total: gl.tensor,
    count: gl.tensor, scale_log2: gl.tensor, cap_log2: gl.tensor, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """The other tiles of keys, each one's softmax under the product of the weights before it with their values."""
    k_smem, v_smem, k_ready, v_ready, k_free, v_free = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    sums = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, sums_layout)
    first, token = tile * BLOCK_N, gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))[None, :] + tile * BLOCK_N
    for _ in range(num_tiles):
        before, phase_before = count % STAGES, (count // STAGES) & 1
        count += 1
        stage, phase = count % STAGES, (count // STAGES) & 1
        first -= BLOCK_N
        token -= BLOCK_N
        mbarrier.wait(k_ready.index(stage), phase)
        pending = warpgroup_mma(q_smem, k_smem.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(before), phase_before)
        pending_sums = warpgroup_mma(weights, v_smem.index(before), sums, is_async=True)
        scores = warpgroup_mma_wait(1, [pending])
        mbarrier.arrive(k_free.index(stage), count=1)
        scores = mask(
            scores, token, position, kv_len, first, low, high, scale_log2, cap_log2, False, BLOCK_N, CAUSAL, WINDOW,
            SOFT_CAP,
        )  # fmt: skip
        fresh, peak, total, shrink = softmax(scores, peak, total, 1.0 if SOFT_CAP else scale_log2)
        sums = warpgroup_mma_wait(0, [pending_sums])
        mbarrier.arrive(v_free.index(before), count=1)
        sums = sums * gl.convert_layout(shrink, gl.SliceLayout(1, sums_layout))[:, None]
        weights = gl.convert_layout(fresh.to(q_smem.dtype), gl.DotOperandLayout(0, sums_layout, 2))
    return weights, sums, total, count


@gluon.jit
def _consume(
    PART: gl.constexpr, q: gl.tensor, q_smem: gl.shared_memory_descriptor, ring: gl.tuple, out: gl.tensor,
    sinks: gl.tensor, cu_q_lens: gl.tensor, kv_lens: gl.tensor, tiles: gl.tensor, num_tiles: gl.tensor,
    scale_log2: gl.tensor, cap_log2: gl.tensor, q_stride: gl.tensor, out_stride: gl.tensor,
    Q_HEAD_STRIDE: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    SOFT_CAP: gl.constexpr, SINKS: gl.constexpr,
) -> None:  # fmt: skip
    """Attend for the rows of one group of warps in every tile of this program."""
    _k_smem, v_smem, _k_ready, v_ready, _k_free, v_free = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    where = (cu_q_lens, tiles, q_stride)
    q_smem.store(load_queries(
        q, gl.program_id(0), num_tiles, where, PART, Q_HEAD_STRIDE, HEADS, GROUP, BLOCK_M, ROWS, HEAD_DIM
    ))  # fmt: skip
    fence_async_shared()
    count = 0
    for number in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        kv_head, _seq, row, begin, q_len, kv_len, lowest, highest = find_tile(
            number, cu_q_lens, kv_lens, tiles, HEADS, GROUP, ROWS, BLOCK_N, CAUSAL, WINDOW
        )
        row += PART * BLOCK_M
        low, high = kv_len - q_len + row // GROUP, kv_len - q_len + (row + BLOCK_M - 1) // GROUP
        rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
        position = (kv_len - q_len + rows // GROUP)[:, None]
        peak, total = begin_softmax(sinks, kv_head * GROUP + rows % GROUP, BLOCK_M, BLOCK_N, SINKS)
        weights, peak, total = _attend_first(
            q_smem, ring, position, kv_len, low, high, highest, peak, total, count, scale_log2, cap_log2,
            HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, CAUSAL, WINDOW, SOFT_CAP,
        )  # fmt: skip
        weights, sums, total, count = _attend_rest(
            q_smem, ring, weights, position, kv_len, low, high, highest, highest - lowest, peak, total, count,
            scale_log2, cap_log2, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, CAUSAL, WINDOW, SOFT_CAP,
        )  # fmt: skip
        following = number + gl.num_programs(0)  # its queries are on their way during what is left of this
        queries = load_queries(
            q, following, num_tiles, where, PART, Q_HEAD_STRIDE, HEADS, GROUP, BLOCK_M, ROWS, HEAD_DIM
        )
        stage = count % STAGES
        mbarrier.wait(v_ready.index(stage), (count // STAGES) & 1)
        sums = warpgroup_mma_wait(0, [warpgroup_mma(weights, v_smem.index(stage), sums, is_async=True)])
        mbarrier.arrive(v_free.index(stage), count=1)
        count += 1
        q_smem.store(queries)
        fence_async_shared()
        divisor = gl.convert_layout(gl.where(total > 0, total, 1.0), gl.SliceLayout(1, sums_layout))
        store_rows(out, sums / divisor[:, None], row, kv_head, begin, q_len, out_stride, GROUP, BLOCK_M, HEAD_DIM)


@gluon.jit(do_not_specialize=["num_tiles", "table_stride"])
def hopper_prefill_kernel(
    q: gl.tensor, k_desc: tma.tensor_descriptor, v_desc: tma.tensor_descriptor, page_table: gl.tensor,
    cu_q_lens: gl.tensor, kv_lens: gl.tensor, tiles: gl.tensor, sinks: gl.tensor, out: gl.tensor,
    num_tiles: gl.tensor, scale_log2: gl.tensor, cap_log2: gl.tensor, q_stride: gl.tensor,
    out_stride: gl.tensor, table_stride: gl.tensor, Q_HEAD_STRIDE: gl.constexpr, HEADS: gl.constexpr,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, SINKS: gl.constexpr,
) -> None:  # fmt: skip
    """Tiles of all key heads, dealt out to however many programs there are; shapes as `hopper_prefill`."""
    dtype: gl.constexpr = q.dtype.element_ty
    ROWS: gl.constexpr = 2 * BLOCK_M
    keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], dtype)
    queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], dtype)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], keys)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], keys)
    q_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M, HEAD_DIM], queries)
    k_ready, v_ready = _make_barriers(1, STAGES), _make_barriers(1, STAGES)
    k_free, v_free = _make_barriers(2, STAGES), _make_barriers(2, STAGES)
    fence_async_shared()
    ring = (k_smem, v_smem, k_ready, v_ready, k_free, v_free)
    gl.warp_specialize(
        [
            (_consume, (
                0, q, q_smem.index(0), ring, out, sinks, cu_q_lens, kv_lens, tiles, num_tiles, scale_log2, cap_log2,
                q_stride, out_stride, Q_HEAD_STRIDE, HEADS, GROUP, BLOCK_M, ROWS, HEAD_DIM, BLOCK_N, STAGES, CAUSAL,
                WINDOW, SOFT_CAP, SINKS,
            )),
            (_consume, (
                1, q, q_smem.index(1), ring, out, sinks, cu_q_lens, kv_lens, tiles, num_tiles, scale_log2, cap_log2,
                q_stride, out_stride, Q_HEAD_STRIDE, HEADS, GROUP, BLOCK_M, ROWS, HEAD_DIM, BLOCK_N, STAGES, CAUSAL,
                WINDOW, SOFT_CAP, SINKS,
            )),
            (_produce, (
                k_desc, v_desc, ring, page_table, table_stride, cu_q_lens, kv_lens, tiles, num_tiles, HEADS, GROUP,
                ROWS, HEAD_DIM, BLOCK_N, STAGES, PAGE_SIZE, BOX, CAUSAL, WINDOW,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@cache
def _box_layout(box: int, head_dim: int, dtype: torch.dtype) -> Any:
    """How a box lies in shared memory; kept, for every launch asks."""
    return gl.NVMMASharedLayout.get_default_for([box, head_dim], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def hopper_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_q_lens: Tensor,
    kv_lens: Tensor,
    page_table: Tensor,
    tiles: Tensor,
    causal: bool,
    scores: Scores,
    max_programs: int,
) -> Tensor:
    """As `paged_prefill.paged_prefill`, for bfloat16 or float16 and a head_dim that is a power of two up to 256.

    k, v          [pages, page_size, kv_heads, head_dim], contiguous; page_size a power of two from 16 on
    tiles         [n, 2] int32: (sequence, tile of ROWS rows), all once, those that see the most keys first
    max_programs  that may run at a time; each takes several tiles where there are more
    """
    heads, head_dim, page_size = k.shape[2], q.shape[2], k.shape[1]
    out, num_tiles, tokens = q.new_empty(q.shape), len(tiles) * heads, block_n(head_dim)
    if num_tiles == 0:
        return out
    box = min(page_size, tokens)
    layout = _box_layout(box, head_dim, q.dtype)
    k_desc, v_desc = (
        TensorDescriptor.from_tensor(pool.view(-1, heads * head_dim), [box, head_dim], layout) for pool in (k, v)
    )
    hopper_prefill_kernel[(min(num_tiles, max_programs),)](
        q, k_desc, v_desc, page_table, cu_q_lens, kv_lens, tiles, kv_lens if sinks is None else sinks, out, num_tiles,
        *scores.log2, q.stride(0), out.stride(0), page_table.stride(0), Q_HEAD_STRIDE=q.stride(1), HEADS=heads,
        GROUP=q.shape[1] // heads, HEAD_DIM=head_dim, PAGE_SIZE=page_size, BOX=box, BLOCK_M=BLOCK_M, BLOCK_N=tokens,
        STAGES=STAGES, CAUSAL=causal, WINDOW=scores.window or 0, SOFT_CAP=scores.soft_cap is not None,
        SINKS=sinks is not None, num_warps=4,
    )  # fmt: skip
    return out
