"""The feed-forward half of a layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from tessera.kernels.fused import fused_on, hopper_gate_up_for
from tessera.model.layers.linear import Linear
from tessera.model.layers.norm import RMSNorm
from tessera.model.layers.parameter import Placement

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
"""Hugging Face's name -> the function."""


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), with gate and up as one product (SwiGLU, arXiv 2002.05202).

    fused  whether a Triton kernel computes what lies between the products, in SwiGLU only; None: wherever it runs
    """

    def __init__(
        self,
        hidden_size: int,
        size: int,
        activation: str,
        *,
        bias: bool,
        placement: Placement,
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        is_swiglu = ACTIVATIONS[activation] is functional.silu
        self.fused = is_swiglu and (fused_on(placement.device) if fused is None else fused)
        if self.fused:
            from tessera.kernels.swiglu import swiglu

            self._swiglu = swiglu
        self.gate_up = Linear(hidden_size, 2 * size, bias=bias, placement=placement)
        self._hopper = hopper_gate_up_for(self.gate_up.weight) if self.fused and not bias else None
        self.down = Linear(size, hidden_size, bias=bias, placement=placement)
        self.activation = ACTIVATIONS[activation]

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden_size] -> [tokens, hidden_size]"""
        output: Tensor = self.down(self._gated_product(hidden))
        return output

    def add_small(self, hidden: Tensor, norm: RMSNorm) -> Tensor:
        """The sum hidden + mlp(norm(hidden)) of a few tokens, [tokens, hidden_size]; in SwiGLU two launches."""
        if self.activation is functional.silu:
            gated = self.gate_up.small(hidden, norm=norm, gated=True)
        else:
            gated = self._gated(self.gate_up.small(hidden, norm=norm))
        return self.down.small(gated, residual=hidden)

    def _gated_product(self, hidden: Tensor) -> Tensor:
        """activation(gate(hidden)) * up(hidden), [tokens, size]; of few tokens in one launch where a kernel does so."""
        weight = self.gate_up.weight
        if self._hopper is not None and self._hopper.serves_gate_up(hidden.shape[0], weight):
            product: Tensor = self._hopper.gate_up(hidden, weight)
            return product
        gate_up: Tensor = self.gate_up(hidden)
        return self._swiglu(gate_up) if self.fused else self._gated(gate_up)

    def _gated(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.activation(gate) * up


class MLP(nn.Module):
    """down(activation(up(x)))"""

    def __init__(self, hidden_size: int, size: int, activation: str, *, bias: bool, placement: Placement) -> None:
        super().__init__()
        self.up = Linear(hidden_size, size, bias=bias, placement=placement)
        self.down = Linear(size, hidden_size, bias=bias, placement=placement)
        self.activation = ACTIVATIONS[activation]

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden_size] -> [tokens, hidden_size]"""
        output: Tensor = self.down(self.activation(self.up(hidden)))
        return output
