"""Linear layers: one weight, whose slices a loader fills where a checkpoint has several."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessera.kernels.small_linear_tiles import FEW_ROWS, MAX_ROWS, MORE_ROWS
from tessera.model.layers.four_bits import MOST_TOKENS, FourBits
from tessera.model.layers.norm import RMSNorm
from tessera.model.layers.parameter import Placement

MOST_WEIGHT_BYTES = ((MAX_ROWS, 2**22), (64, 2**24))
"""Tokens up to which `small_linear` beats cuBLAS and the launches around it, and the size of a weight up to which it
does: measured on an H200, where Qwen3-0.6B's, of 4 to 13 MB, lose together from 80 tokens on, those of 33 MB from 4."""
ANY_WEIGHT_TOKENS = 2
"""Most tokens for which it does whatever the weight."""


class Linear(nn.Module):
    """x · weightᵀ + bias.

    After `prepare`, on a CPU in the types that `packs` names, oneDNN multiplies by a weight packed once: faster,
    and with AVX2 in fp32 a row of the result had the same bits whatever other rows came with it, which
    `functional.linear` does not keep. Steps of up to `MOST_TOKENS` tokens are multiplied by `four_bits` where a loader
    has kept them.
    """

    weight: nn.Parameter
    """[num_outputs, num_inputs]; empty once packed."""
    bias: nn.Parameter | None

    def __init__(self, num_inputs: int, num_outputs: int, *, bias: bool, placement: Placement) -> None:
        super().__init__()
        self.weight = placement.empty(num_outputs, num_inputs)
        self.bias = placement.empty(num_outputs) if bias else None
        self.packed: Tensor | None = None
        self.four_bits: FourBits | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, num_inputs] -> [tokens, num_outputs]"""
        if self.four_bits is not None and hidden.shape[0] <= MOST_TOKENS:
            return self.four_bits.multiply(hidden, self.bias)
        if self.packed is None:
            return functional.linear(hidden, self.weight, self.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self.packed, self.bias, "none", [], "")
        return product

    def small(
        self, hidden: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None, gated: bool = False
    ) -> Tensor:
        """The product of a few rows, with what stands around it, in one launch of a Triton kernel.

        It rounds once, where norm, product, SwiGLU and sum apart round each. Beyond FEW_ROWS tokens the norm is a
        launch of its own: there each program would norm all rows again, which takes longer than the launch.

        hidden    [tokens, num_inputs], as many as `serves_small` names
        norm      goes before the product
        residual  [tokens, outputs], added after it
        gated     the outputs are silu(first half) * second half
        returns   [tokens, outputs]
        """
        from tessera.kernels.small_linear import Norm, small_linear

        if norm is not None and hidden.shape[0] > FEW_ROWS:
            hidden, norm = norm(hidden), None
        within = None if norm is None else Norm(norm.weight, norm.eps)
        return small_linear(hidden, self.weight, self.bias, norm=within, residual=residual, gated=gated)

    def serves_small(self, num_tokens: int) -> bool:
        """Whether `small` takes so many tokens, and is the faster way; never where the weight is packed."""
        most = ANY_WEIGHT_TOKENS
        for tokens, num_bytes in MOST_WEIGHT_BYTES:
            if self.weight.nbytes <= num_bytes:
                most = max(most, min(tokens, MAX_ROWS if self.weight.itemsize == 2 else MORE_ROWS))
        return self.packed is None and 1 <= num_tokens <= most

    def prepare(self) -> None:
        """Pack the weight where that pays; called once, after loading.

        This layer's own reference to the unpacked weight is dropped, so memory is not doubled unless
        another layer shares it.
        """
        if packs(self.weight.dtype, self.weight.device) and self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `Linear.prepare` packs weights of this type there: bfloat16 where the processor can multiply it."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
