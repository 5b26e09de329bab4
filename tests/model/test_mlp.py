"""Which kernel multiplies by gate and up is decided by the layer and the number of tokens."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tessera.kernels import fused
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="what fails without a GPU is tested")
@pytest.mark.parametrize("fails", ["import", "launch"])
def test_where_the_kernel_for_hopper_fails_cublas_serves_and_a_warning_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    pytest.importorskip("triton")
    from tessera.kernels import hopper_gate_up

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(hopper_gate_up, "serves_gate_up", lambda *_: True)
    if fails == "import":
        monkeypatch.setitem(sys.modules, "tessera.kernels.hopper_gate_up", None)
        monkeypatch.delattr("tessera.kernels.hopper_gate_up")
    weight: Any = SimpleNamespace(device=torch.device("cuda"))
    fused._gate_up_module.cache_clear()
    fused._gate_up_runs.cache_clear()
    with caplog.at_level("WARNING"):
        assert [hopper_gate_up_for(weight) for _ in range(3)] == [None] * 3
    fused._gate_up_module.cache_clear()
    fused._gate_up_runs.cache_clear()
    (record,) = caplog.records
    assert "cuBLAS serves" in record.getMessage()
