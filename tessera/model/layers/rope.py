"""Rotary position embedding (RoFormer, arXiv 2104.09864), halves convention: i turns with i + head_dim / 2."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tessera.kernels.fused import fused_on
from tessera.model.spec import Rope

Rotation = tuple[Tensor, Tensor]
"""For each token the cosines, [tokens, 1, head_dim], and the sines, [tokens, 1, head_dim / 2]."""


class RotaryEmbedding(nn.Module):
    """The rotations of a step's positions, computed once a step and used in every layer.

    There is no table: at 128 Ki positions one would weigh 64 MiB, while six small operations a step, or one fused, cost
    less than one layer's. The bits for a position do not depend on what else is in the step.

    fused  whether a Triton kernel computes them, in one launch; None: wherever it runs
    """

    def __init__(self, rope: Rope, head_dim: int, device: torch.device, *, fused: bool | None = None) -> None:
        super().__init__()
        self.fused = fused_on(device) if fused is None else fused
        self.frequencies = frequencies(rope, head_dim).to(device)
        self.attention_factor = rope.attention_factor

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """[tokens] int64 -> the tokens' rotations, computed in fp32 and rounded to `dtype`"""
        if self.fused:
            from tessera.kernels.step_begin import rotations

            return rotations(positions, self.frequencies, self.attention_factor, dtype)
        angles = positions.to(torch.float32)[:, None, None] * self.frequencies
        cosine, sine = angles.cos(), angles.sin()
        if self.attention_factor != 1:
            cosine, sine = cosine * self.attention_factor, sine * self.attention_factor
        return torch.cat((cosine, cosine), -1).to(dtype), sine.to(dtype)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turn each head of each token to its position.

    heads     [tokens, heads, head_dim]
    returns   the same shape
    """
    cosines, sines = rotation
    turned = heads * cosines
    # In place on the one new tensor: at long prompts every further one costs more than its arithmetic.
    turned_first, turned_second = turned.chunk(2, -1)
    first, second = heads.chunk(2, -1)
    turned_first.addcmul_(second, sines, value=-1)
    turned_second.addcmul_(first, sines)
    return turned


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """[head_dim / 2] fp32: radians a position, for each pair of dimensions."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.theta**steps
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        return _llama3(plain, rope)
    if rope.scaling == "yarn":
        return _yarn(plain, rope, head_dim)
    if rope.scaling == "factors":
        return plain / torch.tensor(rope.factors, dtype=torch.float32)
    return plain


def _llama3(plain: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: slow dimensions are stretched by `factor`, fast ones kept, those between blended."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(plain: Tensor, rope: Rope, head_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071), "NTK-by-parts": the blend is a ramp over dimensions between two turn counts."""

    def dimension(turns: float) -> float:
        """Which dimension makes that many turns within the original context."""
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / rope.factor * stretched + plain * (1 - stretched)
