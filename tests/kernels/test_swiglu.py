"""SwiGLU in one launch gives what torch's two operators give."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from triton_interpreter import (
    DEVICE,
    check_in_interpreter,
    compile_for_hopper,
    every_dtype,
    loads_before_waiting,
    needs_compiler,
    needs_cuda,
    needs_kernels,
    outside_interpreter,
    ulps_apart,
)

pytest.importorskip("triton", reason="triton is not installed")
from tessera.kernels.swiglu import BLOCK, swiglu, swiglu_kernel


@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@every_dtype
@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (5, 1536), (3, 1000), (7, 1), (0, 64)])
def test_it_equals_torch_but_for_the_last_places(dtype: torch.dtype, tokens: int, size: int) -> None:
    gate_up = (torch.randn(tokens, 2 * size) * 4).to(dtype)
    expected = functional.silu(gate_up[:, :size]) * gate_up[:, size:]
    found = swiglu(gate_up.to(DEVICE))
    assert found.is_contiguous()
    # The exp of two libraries; in half types rounded twice.
    assert ulps_apart(found, expected) <= (32 if dtype == torch.float32 else 2)


@needs_kernels
def test_extreme_gates_give_zero_or_themselves_and_no_nan() -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 6e4]])
    found = swiglu(torch.cat([gate, torch.ones_like(gate)], 1).to(DEVICE))
    assert found.tolist() == [[0.0, pytest.approx(0.0), 0.0, 100.0, 6e4]]


@needs_kernels
def test_rows_may_lie_apart() -> None:
    wide = torch.randn(4, 3 * 48, device=DEVICE)
    assert torch.equal(swiglu(wide[:, 16:112]), swiglu(wide[:, 16:112].contiguous()))


@needs_compiler
def test_it_compiles_for_hopper_with_wide_loads() -> None:
    kinds = {"gate_up": "*bf16", "out": "*bf16"}
    ptx = compile_for_hopper(swiglu_kernel, kinds, {"BLOCK": BLOCK, "PDL": True}, BLOCK // 256)
    assert "ld.global.v4.b32" in ptx
    assert loads_before_waiting(ptx) == 0


@needs_cuda
def test_a_graph_replays_on_what_its_input_then_holds() -> None:
    gate_up = torch.randn(8, 512, device=DEVICE, dtype=torch.bfloat16)
    swiglu(gate_up)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = swiglu(gate_up)
    gate_up.normal_()
    graph.replay()
    assert torch.equal(out, swiglu(gate_up))
