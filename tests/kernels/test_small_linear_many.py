"""Products of 17 to 256 rows: right to one rounding, the same bits in any batch, weights under way before it waits."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from tessera.kernels.small_linear import small_linear
from tessera.kernels.small_linear_many import many_rows_kernel
from tessera.kernels.small_linear_tiles import many_rows_tiles
from test_small_linear import arguments, by_torch, placed
from triton_interpreter import (
    DEVICE,
    check_in_interpreter,
    compile_for_hopper,
    loads_before_waiting,
    needs_compiler,
    needs_cuda,
    needs_kernels,
    outside_interpreter,
)

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
PARTS: dict[str, dict[str, bool]] = {
    "qkv": {"bias": True},
    "output": {"residual": True},
    "gate_up": {"gated": True, "bias": True},
}


@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(36, 96), (65, 200), (33, 1152)])
@pytest.mark.parametrize("num_rows", [17, 64, 100, 256])
def test_it_equals_float64_to_one_rounding(
    num_rows: int, num_outputs: int, num_inputs: int, parts: dict[str, bool]
) -> None:
    given = arguments(num_rows, num_outputs, num_inputs, DTYPE, **parts)
    found = small_linear(**placed(given, DTYPE))
    assert found.dtype == DTYPE and found.shape == (num_rows, num_outputs)
    torch.testing.assert_close(found.cpu().double(), by_torch(**given), atol=2e-5, rtol=torch.finfo(DTYPE).eps * 0.52)


@needs_kernels
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_row_has_the_same_bits_in_any_batch(parts: dict[str, bool]) -> None:
    given = placed(arguments(256, 40, 192, DTYPE, **parts), DTYPE)
    whole = small_linear(**given)
    for count in (17, 65, 129):
        some = {
            name: value[:count] if name in ("x", "residual") and value is not None else value
            for name, value in given.items()
        }
        assert torch.equal(small_linear(**some), whole[:count])


@needs_compiler
@pytest.mark.parametrize("num_rows", [64, 128, 256])
@pytest.mark.parametrize("gated", [False, True])
def test_on_hopper_weights_are_under_way_before_it_waits(num_rows: int, gated: bool) -> None:
    tiles = many_rows_tiles(num_rows, 576, gated=gated, shared_memory=227 << 10)
    constants: dict[str, Any] = {"K": 576, "NORM": False, "BIAS": False, "RESIDUAL": not gated, "GATED": gated}
    constants |= {"ROWS": tiles.rows, "TILE": tiles.tile, "CHUNK": tiles.chunk, "STAGES": tiles.stages}
    constants |= {"LINES": tiles.lines, "PDL": True}
    kinds = dict.fromkeys(("x", "weight", "bias", "norm_weight", "residual", "out"), "*bf16") | {"eps": "fp32"}
    ptx = compile_for_hopper(many_rows_kernel, kinds, constants, tiles.num_warps)
    assert "wgmma.mma_async" in ptx and "cp.async" in ptx
    assert "prefetch.global.L2" in ptx.partition("griddepcontrol.wait")[0] and loads_before_waiting(ptx) == 0


@needs_cuda
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(960, 576), (576, 576), (3072, 576), (576, 1536)])
@pytest.mark.parametrize("num_rows", [40, 128, 256])
def test_a_models_sizes_on_the_gpu(num_rows: int, num_outputs: int, num_inputs: int) -> None:
    gated = num_outputs == 3072
    outputs = num_outputs // 2 if gated else num_outputs
    given = arguments(num_rows, outputs, num_inputs, DTYPE, gated=gated, residual=num_outputs == 576)
    found = small_linear(**placed(given, DTYPE))
    torch.testing.assert_close(found.cpu().double(), by_torch(**given), atol=1e-4, rtol=torch.finfo(DTYPE).eps * 0.55)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_rows", [17, 64, 128, 256])
@pytest.mark.parametrize(("shared_memory", "most"), [(227 << 10, 8), (163 << 10, 7), (99 << 10, 4)])
def test_as_many_chunks_are_on_their_way_as_shared_memory_holds(
    num_rows: int, gated: bool, shared_memory: int, most: int
) -> None:
    stages = []
    for num_inputs in (64, 576, 1536):
        tiles = many_rows_tiles(num_rows, num_inputs, gated=gated, shared_memory=shared_memory)
        assert 2 * tiles.stages * tiles.chunk * (tiles.rows + tiles.tile) <= shared_memory - 4096
        assert tiles.stages <= max(2, -(-num_inputs // tiles.chunk))
        stages.append(tiles.stages)
    assert stages[0] == 2 and most - 1 <= stages[1] <= 8
