"""The product with gate and up, and SwiGLU (arXiv 2002.05202) behind it, for steps of a few rows on Hopper, in Gluon.

Such a step waits for the weight. Each program has 128 outputs of all rows, so that the weight is read once and rows,
which come from the second-level cache, once a program: what comes from there bounds the larger steps. One warp copies
tiles of both by TMA, of the weight before it waits for the launch before it (`dependent.py`); two warpgroups multiply,
weights as the operand of 64 rows, so that there need not be 64 rows of x. Gate and up of an output are in one thread.
"""

# ruff: noqa: N803, N806 -- what is compiled in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
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

from tessera.kernels.dependent import launch_constants, let_next_start, pdl_on, wait_for_launch
from tessera.kernels.hopper_tiles import copy_box, make_barriers, make_tiles, meet, reuse
from tessera.kernels.launch import Launcher

OUTPUTS = 64
"""Of a warpgroup: rows of gate, and of up, that one instruction multiplies."""
CHUNK = 64
"""Inputs of a tile: 128 bytes, the widest that a copy lays out for such products."""
WIDTHS = ((16, 0), (32, 0), (64, 0), (64, 32), (128, 0), (128, 32), (128, 64))
"""Rows of x that it is compiled for, in two parts, for sizes are powers of two. With more, sums fill the registers."""
MOST_ROWS = sum(WIDTHS[-1])
FEWEST_PROGRAMS = 96
"""With fewer, the weight does not come at full speed; with more than multiprocessors, some would run alone after all
others. Measured with 112 of 132, Llama 3 8B's."""
MOST_STAGES = 8
SHARED_BESIDE = 2048
"""Bytes of shared memory beside the tiles: barriers, and what the compiler needs."""


def serves_gate_up(num_rows: int, weight: Tensor, processors: int | None = None) -> bool:
    """Whether `gate_up` multiplies so many rows by this weight, and is the faster way on so many multiprocessors.

    processors  None: those of the weight's device
    """
    if not 1 <= num_rows <= MOST_ROWS or weight.element_size() != 2 or weight.dim() != 2 or weight.shape[1] % CHUNK:
        return False
    programs: int = triton.cdiv(weight.shape[0] // 2, 2 * OUTPUTS)
    return FEWEST_PROGRAMS <= programs <= (processors or _properties(weight.device).multi_processor_count)


@gluon.jit
def _copy_weights(
    w_desc: tma.tensor_descriptor, weights: gl.tuple, ready: gl.shared_memory_descriptor, first: gl.tensor,
    num_outputs: gl.tensor, column: gl.tensor, stage: gl.tensor, OUTPUTS: gl.constexpr, BYTES: gl.constexpr,
) -> None:  # fmt: skip
    """Start copying both warpgroups' gate and up, [OUTPUTS, CHUNK] each; `ready` is told of all BYTES of its stage."""
    barrier = ready.index(stage)
    mbarrier.expect(barrier, BYTES)
    copy_box(w_desc, [first, column], barrier, weights[0].index(stage))
    copy_box(w_desc, [num_outputs + first, column], barrier, weights[1].index(stage))
    copy_box(w_desc, [first + OUTPUTS, column], barrier, weights[2].index(stage))
    copy_box(w_desc, [num_outputs + first + OUTPUTS, column], barrier, weights[3].index(stage))


@gluon.jit
def _copy_rows(
    descriptors: gl.tuple, rows: gl.tuple, ready: gl.shared_memory_descriptor, column: gl.tensor, stage: gl.tensor,
    ROWS: gl.constexpr, TAIL: gl.constexpr,
) -> None:  # fmt: skip
    """Start copying all rows of x, [ROWS, CHUNK] and [TAIL, CHUNK]; zeros behind the last."""
    copy_box(descriptors[0], [0, column], ready.index(stage), rows[0].index(stage))
    if TAIL > 0:
        copy_box(descriptors[1], [ROWS, column], ready.index(stage), rows[1].index(stage))


@gluon.jit
def _produce(
    descriptors: gl.tuple, weights: gl.tuple, rows: gl.tuple, ready: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor, num_outputs: gl.tensor, num_chunks: gl.tensor, OUTPUTS: gl.constexpr,
    ROWS: gl.constexpr, TAIL: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """Copy chunk after chunk; of the first ones the weights, which no launch writes, before waiting for the launch."""
    BYTES: gl.constexpr = (4 * OUTPUTS + ROWS + TAIL) * CHUNK * 2
    first, ahead = gl.program_id(0) * 2 * OUTPUTS, gl.minimum(num_chunks, STAGES)
    for chunk in range(ahead):
        _copy_weights(descriptors[2], weights, ready, first, num_outputs, chunk * CHUNK, chunk, OUTPUTS, BYTES)
    wait_for_launch(PDL)
    for chunk in range(ahead):
        _copy_rows(descriptors, rows, ready, chunk * CHUNK, chunk, ROWS, TAIL)
    for chunk in range(ahead, num_chunks):
        stage = chunk % STAGES
        mbarrier.wait(free.index(stage), ((chunk // STAGES) & 1) ^ 1)
        _copy_weights(descriptors[2], weights, ready, first, num_outputs, chunk * CHUNK, stage, OUTPUTS, BYTES)
        _copy_rows(descriptors, rows, ready, chunk * CHUNK, stage, ROWS, TAIL)


@gluon.jit
def _zeros(OUTPUTS: gl.constexpr, WIDTH: gl.constexpr) -> gl.tensor:
    return gl.zeros([OUTPUTS, WIDTH], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16]))


@gluon.jit
def _store(
    out: gl.tensor, gate: gl.tensor, up: gl.tensor, ring: gl.shared_memory_descriptor, first: gl.tensor,
    num_rows: gl.tensor, num_outputs: gl.tensor, FIRST_ROW: gl.constexpr, WIDTH: gl.constexpr, OUTPUTS: gl.constexpr,
) -> None:  # fmt: skip
    """silu(gate) * up, [OUTPUTS, WIDTH], to rows FIRST_ROW .. of out; through `ring`, which nobody reads any more."""
    meet()  # each warp has waited for its own products, which read what is written over here
    buffer = reuse(ring, WIDTH, OUTPUTS)
    buffer.permute((1, 0)).store((gate / (1.0 + gl.exp(-gate)) * up).to(out.dtype.element_ty))
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (OUTPUTS // 8), OUTPUTS // 8], [4, 1], [1, 0])
    row = FIRST_ROW + gl.arange(0, WIDTH, gl.SliceLayout(1, layout))[:, None]
    output = first + gl.arange(0, OUTPUTS, gl.SliceLayout(0, layout))[None, :]
    gl.store(out + row * num_outputs + output, buffer.load(layout), mask=(row < num_rows) & (output < num_outputs))


@gluon.jit
def _consume(
    PART: gl.constexpr, gates: gl.shared_memory_descriptor, ups: gl.shared_memory_descriptor, rows: gl.tuple,
    ready: gl.shared_memory_descriptor, free: gl.shared_memory_descriptor, out: gl.tensor, num_rows: gl.tensor,
    num_outputs: gl.tensor, num_chunks: gl.tensor, OUTPUTS: gl.constexpr, ROWS: gl.constexpr, TAIL: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """What warpgroup PART computes: OUTPUTS outputs of all rows. While one chunk is multiplied the next is begun."""
    wait_for_launch(PDL)
    gate, up = _zeros(OUTPUTS, ROWS), _zeros(OUTPUTS, ROWS)
    gate_tail, up_tail = gate, up
    if TAIL > 0:
        gate_tail, up_tail = _zeros(OUTPUTS, TAIL), _zeros(OUTPUTS, TAIL)
    for chunk in range(num_chunks):
        stage = chunk % STAGES
        mbarrier.wait(ready.index(stage), (chunk // STAGES) & 1)
        some = rows[0].index(stage).permute((1, 0))
        pending = warpgroup_mma(gates.index(stage), some, gate, is_async=True)
        pending_up = warpgroup_mma(ups.index(stage), some, up, is_async=True)
        if TAIL > 0:
            others = rows[1].index(stage).permute((1, 0))
            pending_tail = warpgroup_mma(gates.index(stage), others, gate_tail, is_async=True)
            pending_up_tail = warpgroup_mma(ups.index(stage), others, up_tail, is_async=True)
            gate, up, gate_tail, up_tail = warpgroup_mma_wait(4, [pending, pending_up, pending_tail, pending_up_tail])
        else:
            gate, up = warpgroup_mma_wait(2, [pending, pending_up])
            gate_tail, up_tail = gate, up
        mbarrier.arrive(free.index((chunk + STAGES - 1) % STAGES), count=1, pred=chunk > 0)
    first = (gl.program_id(0) * 2 + PART) * OUTPUTS
    if TAIL > 0:
        gate, up, gate_tail, up_tail = warpgroup_mma_wait(0, [gate, up, gate_tail, up_tail])
        _store(out, gate_tail, up_tail, gates, first, num_rows, num_outputs, ROWS, TAIL, OUTPUTS)
    else:
        gate, up = warpgroup_mma_wait(0, [gate, up])
    _store(out, gate, up, gates, first, num_rows, num_outputs, 0, ROWS, OUTPUTS)


@gluon.jit(do_not_specialize=["num_rows"])
def hopper_gate_up_kernel(
    out: gl.tensor, x_desc: tma.tensor_descriptor, tail_desc: tma.tensor_descriptor, w_desc: tma.tensor_descriptor,
    num_rows: gl.tensor, num_outputs: gl.tensor, num_chunks: gl.tensor, OUTPUTS: gl.constexpr, ROWS: gl.constexpr,
    TAIL: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """2 * OUTPUTS outputs of up to ROWS + TAIL rows; grid (outputs / (2 * OUTPUTS)). Shapes as `gate_up`."""
    dtype: gl.constexpr = out.dtype.element_ty
    let_next_start(PDL)
    x = make_tiles(dtype, STAGES, ROWS, CHUNK)
    rows = (x, make_tiles(dtype, STAGES, TAIL, CHUNK) if TAIL > 0 else x)
    gates, ups = make_tiles(dtype, STAGES, OUTPUTS, CHUNK), make_tiles(dtype, STAGES, OUTPUTS, CHUNK)
    more_gates, more_ups = make_tiles(dtype, STAGES, OUTPUTS, CHUNK), make_tiles(dtype, STAGES, OUTPUTS, CHUNK)
    ready, free = make_barriers(1, STAGES), make_barriers(2, STAGES)
    fence_async_shared()
    gl.warp_specialize([
        (_consume, (
            0, gates, ups, rows, ready, free, out, num_rows, num_outputs, num_chunks, OUTPUTS, ROWS, TAIL, STAGES, PDL,
        )),
        (_consume, (
            1, more_gates, more_ups, rows, ready, free, out, num_rows, num_outputs, num_chunks, OUTPUTS, ROWS, TAIL,
            STAGES, PDL,
        )),
        (_produce, (
            (x_desc, tail_desc, w_desc), (gates, ups, more_gates, more_ups), rows, ready, free, num_outputs,
            num_chunks, OUTPUTS, ROWS, TAIL, CHUNK, STAGES, PDL,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


_launch_gate_up = Launcher(hopper_gate_up_kernel)


def gate_up(x: Tensor, weight: Tensor, *, pdl: bool | None = None) -> Tensor:
    """silu(x · gateᵀ) * (x · upᵀ), computed in float32 and rounded once, at the end.

    x        [rows, inputs], as many rows as `serves_gate_up` says; bfloat16 or float16
    weight   [2 * outputs, inputs], contiguous, gate before up, of the same dtype
    pdl      see `dependent.py`; None: where `pdl_on`
    returns  [rows, outputs], a new tensor
    """
    x, num_rows, num_outputs = x.contiguous(), x.shape[0], weight.shape[0] // 2
    rows, tail = next(width for width in WIDTHS if num_rows <= sum(width))
    out = x.new_empty(num_rows, num_outputs)
    _launch_gate_up(
        (triton.cdiv(num_outputs, 2 * OUTPUTS),),
        out, _tiles_of(x, rows), _tiles_of(x, tail or rows), _tiles_of(weight, OUTPUTS), num_rows, num_outputs,
        x.shape[1] // CHUNK, OUTPUTS=OUTPUTS, ROWS=rows, TAIL=tail, CHUNK=CHUNK, STAGES=_stages(x.device, rows + tail),
        num_warps=4, **launch_constants(pdl_on(x.device) if pdl is None else pdl),
    )  # fmt: skip
    return out


@cache
def _stages(device: torch.device, rows: int) -> int:
    """Chunks that there is room for."""
    room: int = _properties(device).shared_memory_per_block_optin - SHARED_BESIDE
    return min(MOST_STAGES, room // ((4 * OUTPUTS + rows) * CHUNK * 2))


@cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


@cache
def _layout(rows: int, dtype: torch.dtype) -> Any:
    """How a tile lies in shared memory; kept, for every launch asks."""
    return gl.NVMMASharedLayout.get_default_for([rows, CHUNK], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def _tiles_of(matrix: Tensor, rows: int) -> TensorDescriptor:
    """What the copy engine is told of a matrix: tiles of so many rows and CHUNK columns."""
    return TensorDescriptor.from_tensor(matrix, [rows, CHUNK], _layout(rows, matrix.dtype))
