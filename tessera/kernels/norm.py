"""RMSNorm (arXiv 1910.07467) in one launch, with the sum of two tensors before it where a layer adds its output."""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.dependent import launch_constants, pdl_on, wait_for_launch
from tessera.kernels.launch import Launch, Launcher

NUMBERS_PER_WARP = 512
"""Of a row: two loads of 16 bytes a thread in half types."""
MAX_WARPS = 16


@triton.jit
def rms_norm_kernel(
    hidden: tl.tensor, update: tl.tensor, weight: tl.tensor, total: tl.tensor, out: tl.tensor,
    hidden_stride: tl.tensor, update_stride: tl.tensor, eps: tl.tensor,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One row, held in registers; grid (rows). Shapes as `add_rms_norm`, update and total where ADD."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < SIZE
    factors = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    wait_for_launch(PDL)
    values = tl.load(hidden + row * hidden_stride + column, mask=real, other=0.0)
    if ADD:
        added = tl.load(update + row * update_stride + column, mask=real, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
        tl.store(total + row * SIZE + column, values, mask=real)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    tl.store(out + row * SIZE + column, (wide * scale * factors).to(values.dtype), mask=real)


_launch_rms_norm = Launcher(rms_norm_kernel)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, *, pdl: bool | None = None) -> Tensor:
    """Rows at a root mean square of 1, times the weight; computed in float32 and rounded once.

    hidden   [..., size]
    weight   [size]
    pdl      see `dependent.py`; None: where `pdl_on`
    returns  [..., size], contiguous
    """
    rows = _rows(hidden)
    out = rows.new_empty(*rows.shape)  # numbers: a shape takes torch twice as long to read
    _launch(rows, None, weight, None, out, eps, pdl)
    return out if rows is hidden else out.view(hidden.shape)


def add_rms_norm(
    hidden: Tensor, update: Tensor, weight: Tensor, eps: float, *, pdl: bool | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of two tensors, and its RMSNorm, which reads the sum as it was rounded.

    hidden, update  [..., size], of one shape and dtype
    weight          [size]
    pdl             see `rms_norm`
    returns         (sum, normalised sum), each [..., size], contiguous
    """
    rows, updates = _rows(hidden), _rows(update)
    total, out = rows.new_empty(*rows.shape), rows.new_empty(*rows.shape)
    _launch(rows, updates, weight, total, out, eps, pdl)
    return (total, out) if rows is hidden else (total.view(hidden.shape), out.view(hidden.shape))


def _rows(hidden: Tensor) -> Tensor:
    """[rows, size] with the numbers of a row together."""
    rows = hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1])
    return rows if rows.stride()[1] == 1 else rows.contiguous()


def _launch(
    rows: Tensor,
    updates: Tensor | None,
    weight: Tensor,
    total: Tensor | None,
    out: Tensor,
    eps: float,
    pdl: bool | None,
) -> None:
    num_rows, size = rows.shape
    if not num_rows:
        return
    update, target = (rows, out) if updates is None or total is None else (updates, total)
    launch = _compiled(size, updates is not None, pdl_on(rows.device) if pdl is None else pdl)
    launch((num_rows,), rows, update, weight, target, out, rows.stride()[0], update.stride()[0], eps)


@cache
def _compiled(size: int, add: bool, pdl: bool) -> Launch:
    block = triton.next_power_of_2(size)
    num_warps = min(MAX_WARPS, max(1, block // NUMBERS_PER_WARP))
    return _launch_rms_norm.fixed(
        SIZE=size, BLOCK=block, ADD=add, num_warps=num_warps, enable_fp_fusion=False, **launch_constants(pdl)
    )
