"""SwiGLU (arXiv 2002.05202) in one launch: silu(gate) * up, read from the one product that holds both."""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.dependent import launch_constants, pdl_on, wait_for_launch
from tessera.kernels.launch import Launch, Launcher

BLOCK = 1024
"""Numbers a program."""


@triton.jit
def swiglu_kernel(
    gate_up: tl.tensor, out: tl.tensor, row_stride: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr, PDL: tl.constexpr
) -> None:
    """One block of one row; grid (rows * blocks). Rounds after silu as torch does, which has two launches."""
    blocks = tl.cdiv(size, BLOCK)
    row, column = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    real = column < size
    wait_for_launch(PDL)
    gate = tl.load(gate_up + row * row_stride + column, mask=real, other=0.0)
    up = tl.load(gate_up + row * row_stride + size + column, mask=real, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * size + column, (activated * up.to(tl.float32)).to(gate.dtype), mask=real)


_launch_swiglu = Launcher(swiglu_kernel)


def swiglu(gate_up: Tensor, *, pdl: bool | None = None) -> Tensor:
    """silu(gate) * up, computed in float32 and rounded after each of the two.

    gate_up  [tokens, 2 * size], gate before up; rows may be further apart
    pdl      see `dependent.py`; None: where `pdl_on`
    returns  [tokens, size], contiguous
    """
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, size)
    if tokens:
        launch, blocks = _compiled(size, pdl_on(gate_up.device) if pdl is None else pdl)
        launch((tokens * blocks,), gate_up, out, gate_up.stride(0), size)
    return out


@cache
def _compiled(size: int, pdl: bool) -> tuple[Launch, int]:
    """The launch of rows of this size, and programs a row."""
    block = min(BLOCK, triton.next_power_of_2(size))
    num_warps = max(1, block // 256)
    launch = _launch_swiglu.fixed(BLOCK=block, num_warps=num_warps, enable_fp_fusion=False, **launch_constants(pdl))
    return launch, triton.cdiv(size, block)
