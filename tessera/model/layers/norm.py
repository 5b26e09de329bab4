"""Normalisation, computed in fp32 whatever the type of the activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessera.kernels.fused import fused_on
from tessera.model.layers.parameter import Placement


class RMSNorm(nn.Module):
    """Scales vectors to a root mean square of 1, then by a learned weight (arXiv 1910.07467).

    In half types this rounds once, at the end; transformers rounds before the weight as well.

    fused  whether Triton kernels compute it; None: wherever they run
    """

    weight: nn.Parameter
    """[size]"""

    def __init__(self, size: int, eps: float, placement: Placement, *, fused: bool | None = None) -> None:
        super().__init__()
        self.weight = placement.empty(size)
        self.shape = (size,)
        self.eps = eps
        self.fused = fused_on(placement.device) if fused is None else fused
        if self.fused:
            from tessera.kernels.norm import add_rms_norm, rms_norm

            self._rms_norm, self._add_rms_norm = rms_norm, add_rms_norm
        self.epsilon = torch.tensor(eps, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., size] -> [..., size]"""
        if self.fused:
            return self._rms_norm(hidden, self.weight, self.eps)
        if hidden.device.type != "cpu":
            return functional.rms_norm(hidden, self.shape, self.weight, self.eps)
        # Torch has no fused kernel on a CPU; its own composition takes eleven operations, this one six.
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.epsilon, norm, norm, value=1 / self.shape[0]).rsqrt_()
        return torch.mul(hidden, scale).mul_(self.weight).to(hidden.dtype)

    def add(self, hidden: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of two tensors, and that sum, as it was rounded, normalised; all [..., size]."""
        if self.fused:
            return self._add_rms_norm(hidden, update, self.weight, self.eps)
        total = hidden + update
        return total, self(total)


class LayerNorm(nn.Module):
    """Shifts vectors to mean 0 and scales them to variance 1, then by learned weight and bias."""

    weight: nn.Parameter
    """[size]"""
    bias: nn.Parameter
    """[size]"""

    def __init__(self, size: int, eps: float, placement: Placement) -> None:
        super().__init__()
        self.weight = placement.empty(size)
        self.bias = placement.empty(size)
        self.shape = (size,)
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., size] -> [..., size]"""
        return functional.layer_norm(hidden, self.shape, self.weight, self.bias, self.eps)
