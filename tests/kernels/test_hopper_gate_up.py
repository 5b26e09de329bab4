"""The Hopper kernel of gate and up cannot run here, but it compiles: for sm_90, without a GPU."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton", reason="triton is not installed")
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16

from tessera.kernels import hopper_gate_up
from tessera.kernels.hopper_gate_up import CHUNK, MOST_ROWS, OUTPUTS, WIDTHS, gate_up, serves_gate_up

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU is here"
)


@pytest.mark.parametrize(("rows", "tail"), WIDTHS)
def test_it_compiles_into_asynchronous_products_and_copies_of_weights_before_it_waits(rows: int, tail: int) -> None:
    ptx = _compile(rows, tail)
    assert f"wgmma.mma_async.sync.aligned.m64n{rows}k16" in ptx
    assert not tail or f"m64n{tail}k16" in ptx
    copying = ptx[ptx.index("expect_tx") :]
    ahead = copying[: copying.index("griddepcontrol.wait")]
    assert ahead.count("cp.async.bulk.tensor") == 4  # gate and up of two warpgroups
    assert copying.count("cp.async.bulk.tensor") == 8 + (4 if tail else 2)


def test_all_warps_are_through_with_the_ring_before_answers_are_written_over_it() -> None:
    """Each waits for its own products; what none reads any more is known when all have met."""
    for rows, tail in WIDTHS[2:4]:
        for answers in re.findall(r"wgmma\.wait_group\.sync\.aligned 0;(.*?)stmatrix", _compile(rows, tail), re.DOTALL):
            assert "bar.sync" in answers


@pytest.mark.parametrize(
    ("num_rows", "num_weight_rows", "inputs", "dtype", "serves"),
    [
        (64, 28672, 4096, torch.bfloat16, True),
        (64, 28672, 4096, torch.float16, True),
        (64, 28672, 4096, torch.float32, False),
        (MOST_ROWS, 28672, 4096, torch.bfloat16, True),
        (MOST_ROWS + 1, 28672, 4096, torch.bfloat16, False),
        (64, 24576, 4096, torch.bfloat16, True),  # 96 programs
        (64, 16384, 2048, torch.bfloat16, False),  # 64
        (64, 57344, 8192, torch.bfloat16, False),  # 224, of which 92 would run alone
        (64, 28672, 4064, torch.bfloat16, False),  # not in whole chunks
    ],
)
def test_it_serves_few_rows_of_weights_that_keep_all_multiprocessors_busy_once(
    num_rows: int, num_weight_rows: int, inputs: int, dtype: torch.dtype, serves: bool
) -> None:
    weight = torch.empty(num_weight_rows, inputs, dtype=dtype, device="meta")
    assert serves_gate_up(num_rows, weight, 132) is serves


@needs_hopper
@pytest.mark.parametrize("num_rows", [1, 16, 17, 33, 65, 100, 129, 160, 161, 192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_equals_the_product_in_float32(num_rows: int, dtype: torch.dtype) -> None:
    """Of outputs that do not fill the last program, inputs of more chunks than there is room for, and of one chunk."""
    for outputs, inputs in ((8200, 1024), (8192, 64)):
        x, weight = _random(num_rows, inputs, dtype), _random(2 * outputs, inputs, dtype) * inputs**-0.5
        gate, up = (x.double() @ weight.double().T).chunk(2, 1)
        expected = functional.silu(gate) * up
        for pdl in (True, False):
            torch.testing.assert_close(gate_up(x, weight, pdl=pdl).double(), expected, atol=4e-2, rtol=1e-2)


@needs_hopper
def test_a_row_does_not_depend_on_what_the_others_hold() -> None:
    x, weight = _random(100, 512, torch.bfloat16), _random(2 * 8192, 512, torch.bfloat16)
    other = torch.cat([x[:1], torch.full_like(x[1:], torch.nan)])
    assert torch.equal(gate_up(x, weight)[0], gate_up(other, weight)[0])


def _random(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    source = torch.Generator("cuda").manual_seed(rows)
    return torch.randn(rows, columns, device="cuda", generator=source).to(dtype)


def _compile(rows: int, tail: int) -> str:
    """PTX for sm_90."""
    kernel = hopper_gate_up.hopper_gate_up_kernel
    constants = {"OUTPUTS": OUTPUTS, "ROWS": rows, "TAIL": tail, "CHUNK": CHUNK, "STAGES": 4, "PDL": True}
    kinds = {"out": "*bf16", "x_desc": _tiles(rows), "tail_desc": _tiles(tail or rows), "w_desc": _tiles(OUTPUTS)}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, values, {(names.index("out"),): [["tt.divisibility", 16]]})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "launch_pdl": True})
    return str(compiled.asm["ptx"])


def _tiles(rows: int) -> str:
    layout = NVMMASharedLayout.get_default_for([rows, CHUNK], bfloat16)
    return f"tensordesc<bf16[{rows}, {CHUNK}],{layout!r}>"
