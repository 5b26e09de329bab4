"""A linear layer of few rows in one launch, with the norm before it and the sum or SwiGLU after it.

A decode of few sequences does nothing but read weights, so each is read once, as fast as memory gives it, and what
lies between the products rides along: a layer takes four launches of this kernel, one of `rope_pages` and attention's.

Which bits a row has: within 1 to 4 rows, within 5 to 16 and within 17 to 256 they do not depend on how many rows there
are, on what the others hold or on the run, for nothing is added up by atomics. Between the ranges they differ, in the
last places.
"""

# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tessera.kernels.dependent import launch_constants, pdl_on
from tessera.kernels.launch import Launch, Launcher
from tessera.kernels.small_linear_kernels import few_rows_kernel, more_rows_kernel
from tessera.kernels.small_linear_many import many_rows_kernel
from tessera.kernels.small_linear_tiles import (
    FEW_ROWS,
    MAX_ROWS,
    MORE_ROWS,
    few_rows_tiles,
    many_rows_tiles,
    more_rows_tiles,
)

__all__ = ["MAX_ROWS", "MORE_ROWS", "Norm", "serves_small", "small_linear"]


class Norm(NamedTuple):
    """RMSNorm (arXiv 1910.07467) of each row before it is multiplied."""

    weight: Tensor
    """[inputs]"""
    eps: float
    """Added to the mean square."""


def serves_small(num_rows: int, weight: Tensor) -> bool:
    """Whether `small_linear` multiplies so many rows by this weight, which is as `nn.Linear` has it.

    1 to 16 rows, in half types up to `MAX_ROWS`; more than 16 without a norm.
    """
    most = MAX_ROWS if weight.element_size() == 2 else MORE_ROWS
    return 1 <= num_rows <= most and weight.dim() == 2 and weight.numel() > 0 and weight.is_contiguous()


_launch_few_rows, _launch_more_rows = Launcher(few_rows_kernel), Launcher(more_rows_kernel)
_launch_many_rows = Launcher(many_rows_kernel)


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

    x         [rows, inputs], as many rows as `serves_small` says, which may lie apart
    weight    [outputs, inputs], contiguous, of the same dtype; gated: [2 * outputs, inputs], gate before up
    bias      [rows of weight]
    norm      the sum of squares is added up beside the product of x times the norm's weight, and scales the product at
              its end: one pass. In half types that product of x and weight is exact for up to 4 rows; tensor cores,
              which take more, have it rounded. Either way the normed x is not, which torch rounds.
    residual  [rows, outputs], rows may lie apart; left as it is
    gated     act is silu(gate) * up, neither rounded before, where torch rounds gate, up and silu(gate)
    pdl       programmatic dependent launch, see `dependent.py`: a program asks for weights before it waits, so
              they must not have been written by launches that may still be at work. None: where `pdl_on`
    returns   [rows, outputs], a new tensor
    """
    num_rows = x.shape[0]
    if not serves_small(num_rows, weight) or (norm is not None and num_rows > MORE_ROWS):
        raise ValueError(f"{num_rows} rows times a weight of {tuple(weight.shape)} are not for small_linear")
    rows, added = _rows(x), None if residual is None else _rows(residual)
    num_weight_rows, num_inputs = weight.shape
    parts = (norm is not None, bias is not None, residual is not None, gated)
    with_pdl = pdl_on(x.device) if pdl is None else pdl
    launch, programs = _compiled(
        num_rows, num_weight_rows, num_inputs, weight.element_size(), parts, with_pdl, _shared(x.device)
    )
    num_outputs = num_weight_rows // 2 if gated else num_weight_rows
    out = rows.new_empty(num_rows, num_outputs)
    if added is None:
        added = out
    launch(
        (programs,),
        rows, weight, rows if bias is None else bias, rows if norm is None else norm.weight, added, out,
        rows.stride(0), added.stride(0), num_rows, num_outputs, 0.0 if norm is None else norm.eps,
    )  # fmt: skip
    return out


@cache
def _compiled(
    num_rows: int,
    num_weight_rows: int,
    num_inputs: int,
    item_bytes: int,
    parts: tuple[bool, bool, bool, bool],
    pdl: bool,
    shared_memory: int,
) -> tuple[Launch, int]:
    """The launch of so many rows of such a weight, and how many programs it has; parts: norm, bias, residual, gated."""
    constants: dict[str, int] = {"K": num_inputs, **dict(zip(("NORM", "BIAS", "RESIDUAL", "GATED"), parts))}
    if num_rows <= FEW_ROWS:
        launcher, few = _launch_few_rows, few_rows_tiles(num_rows, num_weight_rows, num_inputs)
        constants |= {"ROWS": few.rows, "TILE": few.tile, "CHUNK": few.chunk, "HELD": few.held}
        programs, num_warps = triton.cdiv(num_weight_rows, few.tile), few.num_warps
    else:
        launcher, more = _launch_more_rows, more_rows_tiles(num_weight_rows, num_inputs, item_bytes)
        if num_rows > MORE_ROWS:
            launcher, more = (
                _launch_many_rows,
                many_rows_tiles(num_rows, num_inputs, gated=parts[3], shared_memory=shared_memory),
            )
        constants |= {"ROWS": more.rows, "TILE": more.tile, "CHUNK": more.chunk}
        constants |= {"STAGES": more.stages, "LINES": more.lines}
        programs = triton.cdiv(num_rows, more.rows) * triton.cdiv(num_weight_rows, more.tile)
        num_warps = more.num_warps
    launch = launcher.fixed(**constants, num_warps=num_warps, enable_fp_fusion=False, **launch_constants(pdl))
    return launch, programs


@cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; the least of any GPU since Ampere where there is none."""
    least = 99 << 10
    if device.type != "cuda":
        return least
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", least))


def _rows(x: Tensor) -> Tensor:
    """With the numbers of a row together."""
    return x if x.stride(1) == 1 else x.contiguous()
