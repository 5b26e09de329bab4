"""A linear layer of one to sixteen rows in one launch, with the norm before it and the sum or SwiGLU after it.

A decode of few sequences does nothing but read weights, so each is read once, as fast as memory gives it, and what
lies between the products rides along: a layer takes four launches of this kernel, one of `rope_pages` and attention's.

Which bits a row has: within 1 to 4 rows and within 5 to 16 they do not depend on how many rows there are, on what the
others hold or on the run, for nothing is added up by atomics. Between the two ranges they differ, in the last places.
"""

# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tessera.kernels.launch import Launcher
from tessera.kernels.small_linear_kernels import few_rows_kernel, more_rows_kernel
from tessera.kernels.small_linear_tiles import FEW_ROWS, MAX_ROWS, few_rows_tiles, more_rows_tiles

__all__ = ["MAX_ROWS", "Norm", "pdl_on", "serves_small", "small_linear"]

PDL_CAPABILITY = (9, 0)


class Norm(NamedTuple):
    """RMSNorm (arXiv 1910.07467) of each row before it is multiplied."""

    weight: Tensor
    """[inputs]"""
    eps: float
    """Added to the mean square."""


def serves_small(num_rows: int, weight: Tensor) -> bool:
    """Whether `small_linear` multiplies so many rows by this weight: 1 to 16 rows, a weight as `nn.Linear` has it."""
    return 1 <= num_rows <= MAX_ROWS and weight.dim() == 2 and weight.numel() > 0 and weight.is_contiguous()


@cache
def pdl_on(device: torch.device) -> bool:
    """Whether a device has programmatic dependent launch: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= PDL_CAPABILITY


_launch_few_rows, _launch_more_rows = Launcher(few_rows_kernel), Launcher(more_rows_kernel)


def small_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    pdl: bool | None = None,
) -> Tensor:
    """act(norm(x) · weightᵀ + bias) + residual, computed in float32 and rounded once, at the end.

    x         [rows, inputs], 1 to 16 rows, which may lie apart
    weight    [outputs, inputs], contiguous, of the same dtype; gated: [2 * outputs, inputs], gate before up
    bias      [rows of weight]
    norm      the sum of squares is added up beside the product of x times the norm's weight, and scales the product at
              its end: one pass. In half types that product of x and weight is exact for up to 4 rows; tensor cores,
              which take more, have it rounded. Either way the normed x is not, which torch rounds.
    residual  [rows, outputs], rows may lie apart; left as it is
    gated     act is silu(gate) * up, neither rounded before, where torch rounds gate, up and silu(gate)
    pdl       programmatic dependent launch: the program starts, and asks for weights, while the launch before it on
              the stream is still at work, and waits for that before it touches x, residual or out. Holds for any
              neighbours whose own launches, if they are of this kind, wait (`gdc_wait`) in every program before they
              read or write; weights must not have been written by the launch just before. None: where `pdl_on`.
    returns   [rows, outputs], a new tensor
    """
    num_rows, num_inputs = x.shape
    num_weight_rows = weight.shape[0]
    if not serves_small(num_rows, weight):
        raise ValueError(f"{num_rows} rows times a weight of {tuple(weight.shape)} are not for small_linear")
    rows, residual_rows = _rows(x), None if residual is None else _rows(residual)
    num_outputs = num_weight_rows // 2 if gated else num_weight_rows
    out = rows.new_empty(num_rows, num_outputs)
    launch, constants, per_program, num_warps = _compiled(num_rows, weight)
    with_pdl = pdl_on(x.device) if pdl is None else pdl
    options = {"launch_pdl": True} if with_pdl else {}
    launch(
        (triton.cdiv(num_weight_rows, per_program),),
        rows, weight, rows if bias is None else bias, rows if norm is None else norm.weight,
        out if residual_rows is None else residual_rows, out,
        rows.stride(0), num_outputs if residual_rows is None else residual_rows.stride(0), num_rows, num_outputs,
        0.0 if norm is None else norm.eps,
        K=num_inputs, NORM=norm is not None, BIAS=bias is not None, RESIDUAL=residual is not None, GATED=gated,
        PDL=with_pdl, num_warps=num_warps, enable_fp_fusion=False, **constants, **options,
    )  # fmt: skip
    return out


def _compiled(num_rows: int, weight: Tensor) -> tuple[Launcher, dict[str, int], int, int]:
    """The kernel for so many rows of this weight, what is compiled in, rows of the weight a program, and warps."""
    num_weight_rows, num_inputs = weight.shape
    if num_rows <= FEW_ROWS:
        few = few_rows_tiles(num_rows, num_weight_rows, num_inputs)
        constants = {"ROWS": few.rows, "TILE": few.tile, "CHUNK": few.chunk, "HELD": few.held}
        return _launch_few_rows, constants, few.tile, few.num_warps
    more = more_rows_tiles(num_weight_rows, num_inputs, weight.element_size())
    constants = {"ROWS": more.rows, "TILE": more.tile, "CHUNK": more.chunk, "STAGES": more.stages, "LINES": more.lines}
    return _launch_more_rows, constants, more.tile, more.num_warps


def _rows(x: Tensor) -> Tensor:
    """With the numbers of a row together."""
    return x if x.stride(1) == 1 else x.contiguous()
