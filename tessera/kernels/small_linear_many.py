"""The kernel of `small_linear` for 17 to 256 rows: tiles of both on tensor cores, each program its own outputs.

The products of a small model's layer take such a step a few microseconds each, most of which is starting and waiting
for the first bytes: under dependent launch (PDL) the weights are on their way to the second-level cache before that.
"""

# ruff: noqa: N803, N806, ARG001 -- what Triton compiles in is written in capitals; arguments are those of its siblings
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from tessera.kernels.dependent import let_next_start, prefetch, wait_for_launch


@triton.jit(do_not_specialize=["num_rows"])
def many_rows_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, norm_weight: tl.tensor, residual: tl.tensor, out: tl.tensor,
    x_stride: tl.tensor, residual_stride: tl.tensor, num_rows: tl.tensor, num_outputs: tl.tensor, eps: tl.tensor,
    K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    LINES: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS rows times TILE rows of the weight; grid (tiles of rows * tiles of the weight), those of rows next to one
    another. Shapes as `small_linear`, of half types and without a norm; num_outputs of `out`.

    Gated, a tile of the weight is gate, up, gate, up ... of TILE / 2 outputs.
    """
    tl.static_assert(not NORM, "the norm before so many rows is a launch of its own")
    OUTPUTS: tl.constexpr = TILE // 2 if GATED else TILE
    row_tiles = tl.cdiv(num_rows, ROWS)
    first_row, first_output = tl.program_id(0) % row_tiles * ROWS, tl.program_id(0) // row_tiles * OUTPUTS
    place = tl.arange(0, TILE)
    if GATED:
        weight_row = tl.minimum(first_output + place // 2, num_outputs - 1) + place % 2 * num_outputs
    else:
        weight_row = tl.minimum(first_output + place, num_outputs - 1)
    column = tl.arange(0, CHUNK)[None, :]
    weights = weight + weight_row[:, None].to(tl.int64) * K
    let_next_start(PDL)
    if PDL:
        prefetch(weights + tl.minimum(tl.arange(0, LINES) * 64, K - 1)[None, :])
    wait_for_launch(PDL)
    row = first_row + tl.arange(0, ROWS)
    real_row = (row < num_rows)[:, None]
    values = x + row[:, None].to(tl.int64) * x_stride
    total = tl.zeros([ROWS, TILE], tl.float32)
    for start in tl.range(0, K, CHUNK, num_stages=STAGES):
        if K % CHUNK == 0:
            tile = tl.load(weights + start + column)
            some = tl.load(values + start + column, mask=real_row, other=0.0)
        else:
            tile = tl.load(weights + start + column, mask=start + column < K, other=0.0)
            some = tl.load(values + start + column, mask=real_row & (start + column < K), other=0.0)
        total = tl.dot(some, tl.trans(tile), total)
    if BIAS:
        total += tl.load(bias + weight_row).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(total, [ROWS, OUTPUTS, 2]))
        total = gate / (1.0 + tl.exp(-gate)) * up
    output = (first_output + tl.arange(0, OUTPUTS))[None, :]
    real = real_row & (output < num_outputs)
    if RESIDUAL:
        total += tl.load(residual + row[:, None].to(tl.int64) * residual_stride + output, mask=real, other=0.0)
    tl.store(out + row[:, None].to(tl.int64) * num_outputs + output, total.to(out.dtype.element_ty), mask=real)
