"""What a step begins with, a launch each in place of four to six of torch's: its tokens, and its rotations.

Both are launched as usual, for what `dependent.py` says: later kernels read them before they wait.
"""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.launch import Launcher

BLOCK = 256
"""Tokens a program."""


@triton.jit
def pending_kernel(
    token_ids: tl.tensor, sources: tl.tensor, sampled: tl.tensor, out: tl.tensor, num_tokens: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A block of tokens; grid (blocks). Shapes as `pending_tokens`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < num_tokens
    source = tl.load(sources + at, mask=real, other=-1)
    pending = source >= 0
    known = tl.load(token_ids + at, mask=real & (source < 0), other=0)
    tl.store(out + at, tl.where(pending, tl.load(sampled + source, mask=pending, other=0), known), mask=real)


@triton.jit
def rotations_kernel(
    positions: tl.tensor, frequencies: tl.tensor, cosines: tl.tensor, sines: tl.tensor, factor: tl.tensor,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """The rotations of one token; grid (tokens). Shapes as `rotations`, of heads of 2 * HALF numbers."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    real = pair < HALF
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + pair, mask=real, other=0.0)
    cosine, sine = (tl.cos(angle) * factor).to(cosines.dtype.element_ty), tl.sin(angle) * factor
    tl.store(cosines + token * (2 * HALF) + pair, cosine, mask=real)
    tl.store(cosines + token * (2 * HALF) + HALF + pair, cosine, mask=real)
    tl.store(sines + token * HALF + pair, sine.to(sines.dtype.element_ty), mask=real)


_launch_pending, _launch_rotations = Launcher(pending_kernel), Launcher(rotations_kernel)


def pending_tokens(token_ids: Tensor, sources: Tensor, sampled: Tensor) -> Tensor:
    """A step's tokens: those that are known, and those that the step before has sampled.

    token_ids  [tokens] int64, read where `sources` is negative
    sources    [tokens] int64: where in `sampled` the others stand
    sampled    [rows] int64
    returns    [tokens] int64
    """
    num_tokens = token_ids.shape[0]
    out = token_ids.new_empty(num_tokens)
    if num_tokens:
        _launch_pending((triton.cdiv(num_tokens, BLOCK),), token_ids, sources, sampled, out, num_tokens, BLOCK=BLOCK)
    return out


def rotations(positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions times frequencies, times `factor`, computed in float32 and rounded to `dtype`.

    positions    [tokens] int64
    frequencies  [head_dim / 2] float32
    returns      cosines [tokens, 1, head_dim], each of them twice; sines [tokens, 1, head_dim / 2]
    """
    tokens, half = positions.shape[0], frequencies.shape[0]
    cosines = torch.empty(tokens, 1, 2 * half, dtype=dtype, device=positions.device)
    sines = torch.empty(tokens, 1, half, dtype=dtype, device=positions.device)
    if tokens:
        block = triton.next_power_of_2(half)
        # Without fusing, or a cosine would be multiplied and rounded at once where torch rounds twice.
        _launch_rotations(
            (tokens,), positions, frequencies, cosines, sines, float(factor),
            HALF=half, BLOCK=block, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return cosines, sines
