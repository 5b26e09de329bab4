"""Attention for Hopper GPUs, in Gluon: what FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608) does there.

One warp copies tiles of keys and values from their pages, or packed, into shared memory by TMA and runs ahead, over
the borders of tiles of queries too; two or three warpgroups attend (`hopper_attend.py`).

Rows of keys that no token holds may be anything, NaN too: their scores are masked, their values are set to zero. Where
a head is no power of two, the columns that fill up its last part are of the next head, and multiplied with zeros.
"""

# ruff: noqa: N803, N806 -- what is compiled in is written in capitals; the compiler knows no starred tuples
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tessera.kernels.dependent import launch_constants, pdl_on, wait_for_launch
from tessera.kernels.hopper_attend import consume
from tessera.kernels.hopper_tiles import (
    copy_tile,
    count_turns,
    find_keys,
    find_lens,
    find_piece,
    find_slots,
    make_barriers,
    make_tiles,
)
from tessera.kernels.launch import Launcher
from tessera.kernels.packed import head_parts
from tessera.kernels.scores import Scores

BLOCK_M = 64
"""Rows of a warpgroup: what one instruction multiplies."""


@dataclass(frozen=True)
class HopperOptions:
    """How the kernel is compiled for a head_dim: docs/LOG.md has the times of the others."""

    block_n: int
    """Tokens of a tile of keys."""
    warpgroups: int
    """Those that attend: 2 or 3."""
    stages: int
    """Tiles of keys, and of values, that there is room for."""
    early: bool = True
    """Whether the next queries are loaded while these attend, which takes a second buffer."""
    take_turns: bool = False
    """Whether one warpgroup's products wait for the others', so that softmax and products alternate among them."""

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.warpgroups * BLOCK_M


def hopper_options(head_dim: int, *, paged: bool) -> HopperOptions:
    """The quickest that fit into registers and shared memory, for keys in pages or packed ones."""
    if head_dim > 128:
        return HopperOptions(64, 2, stages=2, early=False)
    if head_dim > 96:
        return HopperOptions(64, 3, stages=3)
    if head_dim > 64:
        return HopperOptions(128, 2, stages=2, take_turns=True)
    return HopperOptions(64, 3, 3, take_turns=True) if paged else HopperOptions(128, 3, 2, take_turns=True)


@gluon.jit
def _produce(
    descriptors: gl.tuple, keys: gl.tuple, values: gl.tuple, page_table: gl.tensor,
    table_stride: gl.tensor, where: gl.tuple, kv_lens: gl.tensor, num_tiles: gl.tensor, HEADS: gl.constexpr,
    GROUP: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, MAIN: gl.constexpr, TAIL: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
) -> None:  # fmt: skip
    """Keys and values of every tile of this program, in the order in which `consume` wants them.

    where  cu_q_lens, tiles, stride of the queries
    """
    k_desc, v_desc, k_tail_desc, v_tail_desc = descriptors
    k_main, k_tail, k_ready, k_free = keys
    v_main, v_tail, v_ready, v_free = values
    count = 0
    for turn in range(count_turns(num_tiles)):
        kv_head, seq, place = find_piece(turn, num_tiles, where[1], HEADS)
        begin, q_len, kv_len = find_lens(seq, where[0], kv_lens)
        low, high = find_keys(place * ROWS, q_len, kv_len, GROUP, ROWS, BLOCK_N, CAUSAL, WINDOW)
        table_row = page_table + seq.to(gl.int64) * table_stride
        for index in range(high - low + 1):
            stage, phase, first = count % STAGES, (count // STAGES) & 1, (high - index) * BLOCK_N
            slots = find_slots(table_row, begin, first, kv_len, BLOCK_N, PAGE_SIZE, BOX)
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            mbarrier.expect(k_ready.index(stage), BLOCK_N * (MAIN + TAIL) * 2)
            copy_tile(k_desc, k_main, k_ready, slots, kv_head * HEAD_DIM, stage, BLOCK_N, BOX)
            if TAIL > 0:
                copy_tile(k_tail_desc, k_tail, k_ready, slots, kv_head * HEAD_DIM + MAIN, stage, BLOCK_N, BOX)
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            mbarrier.expect(v_ready.index(stage), BLOCK_N * (MAIN + TAIL) * 2)
            copy_tile(v_desc, v_main, v_ready, slots, kv_head * HEAD_DIM, stage, BLOCK_N, BOX)
            if TAIL > 0:
                copy_tile(v_tail_desc, v_tail, v_ready, slots, kv_head * HEAD_DIM + MAIN, stage, BLOCK_N, BOX)
            count += 1
    # One more tile of keys is waited for at the end, whose product nobody reads.
    mbarrier.wait(k_free.index(count % STAGES), ((count // STAGES) & 1) ^ 1)
    mbarrier.arrive(k_ready.index(count % STAGES), count=1)


@gluon.jit
def _specialize(
    q: gl.tensor, queries: gl.tuple, keys: gl.tuple, values: gl.tuple, turns: gl.shared_memory_descriptor,
    descriptors: gl.tuple, page_table: gl.tensor, table_stride: gl.tensor, out: gl.tensor, sinks: gl.tensor,
    where: gl.tuple, kv_lens: gl.tensor, num_tiles: gl.tensor, rates: gl.tuple, out_stride: gl.tensor,
    Q_HEAD_STRIDE: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    MAIN: gl.constexpr, TAIL: gl.constexpr, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr, BLOCK_M: gl.constexpr,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    SOFT_CAP: gl.constexpr, SINKS: gl.constexpr, EARLY: gl.constexpr, TAKE_TURNS: gl.constexpr,
    WARPGROUPS: gl.constexpr,
) -> None:  # fmt: skip
    """Set the warpgroups to work, and a warp beside them, each with the registers that it needs."""
    data = (q, keys, values, turns, out, sinks, where, kv_lens, num_tiles, rates, out_stride)
    # With a name, a tuple of numbers that are compiled in would be one of numbers of run time: they are written out.
    if WARPGROUPS == 2:
        gl.warp_specialize([
            (consume, (
                0, queries[0], data, Q_HEAD_STRIDE, HEADS, GROUP, BLOCK_M, ROWS, HEAD_DIM, MAIN, TAIL, BLOCK_N,
                STAGES, CAUSAL, WINDOW, SOFT_CAP, SINKS, EARLY, TAKE_TURNS, WARPGROUPS,
            )),
            (consume, (
                1, queries[1], data, Q_HEAD_STRIDE, HEADS, GROUP, BLOCK_M, ROWS, HEAD_DIM, MAIN, TAIL, BLOCK_N,
                STAGES, CAUSAL, WINDOW, SOFT_CAP, SINKS, EARLY, TAKE_TURNS, WARPGROUPS,
            )),
            (_produce, (
                descriptors, keys, values, page_table, table_stride, where, kv_lens, num_tiles, HEADS, GROUP, ROWS,
                HEAD_DIM, MAIN, TAIL, BLOCK_N, STAGES, PAGE_SIZE, BOX, CAUSAL, WINDOW,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (
                0, queries[0], data, Q_HEAD_STRIDE, HEADS, GROUP, BLOCK_M, ROWS, HEAD_DIM, MAIN, TAIL, BLOCK_N,
                STAGES, CAUSAL, WINDOW, SOFT_CAP, SINKS, EARLY, TAKE_TURNS, WARPGROUPS,
            )),
            (consume, (
                1, queries[1], data, Q_HEAD_STRIDE, HEADS, GROUP, BLOCK_M, ROWS, HEAD_DIM, MAIN, TAIL, BLOCK_N,
                STAGES, CAUSAL, WINDOW, SOFT_CAP, SINKS, EARLY, TAKE_TURNS, WARPGROUPS,
            )),
            (consume, (
                2, queries[2], data, Q_HEAD_STRIDE, HEADS, GROUP, BLOCK_M, ROWS, HEAD_DIM, MAIN, TAIL, BLOCK_N,
                STAGES, CAUSAL, WINDOW, SOFT_CAP, SINKS, EARLY, TAKE_TURNS, WARPGROUPS,
            )),
            (_produce, (
                descriptors, keys, values, page_table, table_stride, where, kv_lens, num_tiles, HEADS, GROUP, ROWS,
                HEAD_DIM, MAIN, TAIL, BLOCK_N, STAGES, PAGE_SIZE, BOX, CAUSAL, WINDOW,
            )),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


@gluon.jit(do_not_specialize=["num_tiles", "table_stride"])
def hopper_prefill_kernel(
    q: gl.tensor, k_desc: tma.tensor_descriptor, v_desc: tma.tensor_descriptor, k_tail_desc: tma.tensor_descriptor,
    v_tail_desc: tma.tensor_descriptor, page_table: gl.tensor, cu_q_lens: gl.tensor, kv_lens: gl.tensor,
    tiles: gl.tensor, sinks: gl.tensor, out: gl.tensor, num_tiles: gl.tensor, scale_log2: gl.tensor,
    cap_log2: gl.tensor, q_stride: gl.tensor, out_stride: gl.tensor, table_stride: gl.tensor,
    Q_HEAD_STRIDE: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    MAIN: gl.constexpr, TAIL: gl.constexpr, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr,
    SINKS: gl.constexpr, EARLY: gl.constexpr, TAKE_TURNS: gl.constexpr, WARPGROUPS: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """Tiles of all key heads, dealt out to however many programs there are; shapes as `hopper_prefill`."""
    dtype: gl.constexpr = q.dtype.element_ty
    ROWS: gl.constexpr = WARPGROUPS * BLOCK_M
    BUFFERS: gl.constexpr = 2 if EARLY else 1
    keys = (
        make_tiles(dtype, STAGES, BLOCK_N, MAIN), make_tiles(dtype, STAGES, BLOCK_N, TAIL),
        make_barriers(1, STAGES), make_barriers(WARPGROUPS, STAGES),
    )  # fmt: skip
    values = (
        make_tiles(dtype, STAGES, BLOCK_N, MAIN), make_tiles(dtype, STAGES, BLOCK_N, TAIL),
        make_barriers(1, STAGES), make_barriers(WARPGROUPS, STAGES),
    )  # fmt: skip
    first = (make_tiles(dtype, BUFFERS, BLOCK_M, MAIN), make_tiles(dtype, BUFFERS, BLOCK_M, TAIL))
    second = (make_tiles(dtype, BUFFERS, BLOCK_M, MAIN), make_tiles(dtype, BUFFERS, BLOCK_M, TAIL))
    third = first
    if WARPGROUPS == 3:
        third = (make_tiles(dtype, BUFFERS, BLOCK_M, MAIN), make_tiles(dtype, BUFFERS, BLOCK_M, TAIL))
    turns = make_barriers(1, WARPGROUPS)
    fence_async_shared()
    wait_for_launch(PDL)
    _specialize(
        q, (first, second, third), keys, values, turns, (k_desc, v_desc, k_tail_desc, v_tail_desc), page_table,
        table_stride, out, sinks, (cu_q_lens, tiles, q_stride), kv_lens, num_tiles, (scale_log2, cap_log2), out_stride,
        Q_HEAD_STRIDE, HEADS, GROUP, HEAD_DIM, MAIN, TAIL, PAGE_SIZE, BOX, BLOCK_M, ROWS, BLOCK_N, STAGES, CAUSAL,
        WINDOW, SOFT_CAP, SINKS, EARLY, TAKE_TURNS, WARPGROUPS,
    )  # fmt: skip


_launch_hopper_prefill = Launcher(hopper_prefill_kernel)


@cache
def _box_layout(box: int, width: int, dtype: torch.dtype) -> Any:
    """How a box lies in shared memory; kept, for every launch asks."""
    return gl.NVMMASharedLayout.get_default_for([box, width], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def hopper_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_q_lens: Tensor,
    kv_lens: Tensor,
    page_table: Tensor | None,
    tiles: Tensor,
    causal: bool,
    scores: Scores,
    max_programs: int,
    pdl: bool | None = None,
) -> Tensor:
    """As `paged_prefill.paged_prefill`, without pages as `packed.packed_attention`, for bfloat16 or float16.

    k, v          [pages, page_size, kv_heads, head_dim], contiguous; page_size a power of two from 16 on. Without a
                  page table [tokens, kv_heads, head_dim], the heads of a token side by side
    tiles         [n, 2] int32: (sequence, tile of `hopper_options(...).rows` rows), all once, those that see the
                  most keys first
    max_programs  that may run at a time; each takes several tiles where there are more
    pdl           see `dependent.py`; None: where `pdl_on`
    """
    heads, head_dim, options = k.shape[-2], q.shape[2], hopper_options(q.shape[2], paged=page_table is not None)
    out, num_tiles = q.new_empty(q.shape), len(tiles) * heads
    if num_tiles == 0:
        return out
    (main, tail), page_size = head_parts(head_dim), 0 if page_table is None else k.shape[1]
    box = min(page_size, options.block_n) if page_size else options.block_n
    table = cu_q_lens if page_table is None else page_table
    _launch_hopper_prefill(
        (min(num_tiles, max_programs),),
        q, *_descriptors(k, v, box, main), *_descriptors(k, v, box, tail or main), table, cu_q_lens, kv_lens, tiles,
        kv_lens if sinks is None else sinks, out, num_tiles, *scores.log2, q.stride(0), out.stride(0), table.stride(0),
        Q_HEAD_STRIDE=q.stride(1), HEADS=heads, GROUP=q.shape[1] // heads, HEAD_DIM=head_dim, MAIN=main, TAIL=tail,
        PAGE_SIZE=page_size, BOX=box, BLOCK_M=BLOCK_M, BLOCK_N=options.block_n, STAGES=options.stages, CAUSAL=causal,
        WINDOW=scores.window or 0, SOFT_CAP=scores.soft_cap is not None, SINKS=sinks is not None, EARLY=options.early,
        TAKE_TURNS=options.take_turns, WARPGROUPS=options.warpgroups, num_warps=4,
        **launch_constants(pdl_on(q.device) if pdl is None else pdl),
    )  # fmt: skip
    return out


def _descriptors(k: Tensor, v: Tensor, box: int, width: int) -> list[TensorDescriptor]:
    """What the copy engine is told of keys and of values: boxes of so many tokens and columns."""
    layout, columns = _box_layout(box, width, k.dtype), k.shape[-2] * k.shape[-1]
    rows = (each.view(-1, columns) if k.dim() == 4 else each.flatten(1) for each in (k, v))
    return [TensorDescriptor.from_tensor(each, [box, width], layout) for each in rows]
