"""Which kernel multiplies by gate and up is decided by the layer and the number of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tessera.kernels.fused import hopper_gate_up_for
from tessera.model.layers import mlp
from tessera.model.layers.parameter import Placement
from triton_interpreter import DEVICE, check_in_interpreter, needs_kernels, outside_interpreter


class Kernel:
    """In place of the module for Hopper: up to three rows, and what it was asked for."""

    rows: list[int]

    @staticmethod
    def serves_gate_up(num_rows: int, weight: Tensor) -> bool:
        return num_rows <= 3 and tuple(weight.shape) == (80, 48)

    @staticmethod
    def gate_up(x: Tensor, weight: Tensor) -> Tensor:
        Kernel.rows.append(len(x))
        gate, up = functional.linear(x, weight).chunk(2, -1)
        return functional.silu(gate) * up


@pytest.mark.timeout(600)
@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@pytest.mark.parametrize(
    ("activation", "bias", "asked"), [("silu", False, [3]), ("silu", True, []), ("gelu", False, [])]
)
def test_few_tokens_of_swiglu_without_a_bias_go_to_the_kernel_for_hopper(
    monkeypatch: pytest.MonkeyPatch, activation: str, bias: bool, asked: list[int]
) -> None:
    placement = Placement(torch.float32, torch.device(DEVICE))
    layers = {}
    for name, kernel in (("other", None), ("hopper", Kernel)):
        monkeypatch.setattr(mlp, "hopper_gate_up_for", lambda _weight, kernel=kernel: kernel)
        torch.manual_seed(0)
        layers[name] = mlp.GatedMLP(48, 40, activation, bias=bias, placement=placement, fused=activation == "silu")
        for parameter in layers[name].parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    Kernel.rows = []
    for num_tokens in (3, 4):
        hidden = torch.randn(num_tokens, 48, device=DEVICE)
        torch.testing.assert_close(layers["hopper"](hidden), layers["other"](hidden))
    assert Kernel.rows == asked


def test_there_is_no_kernel_for_hopper_on_a_cpu() -> None:
    assert hopper_gate_up_for(torch.empty(28672, 4096, dtype=torch.bfloat16)) is None
