"""A linear layer of few rows, with norm, sum and SwiGLU in its one launch, gives what torch's operators give."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from triton_interpreter import (
    DEVICE,
    TWO_DTYPES,
    check_in_interpreter,
    compile_for_hopper,
    loads_before_waiting,
    needs_compiler,
    needs_cuda,
    needs_kernels,
    outside_interpreter,
)

pytest.importorskip("triton", reason="triton is not installed")
from tessera.kernels.dependent import pdl_on
from tessera.kernels.small_linear import MAX_ROWS, MORE_ROWS, Norm, serves_small, small_linear
from tessera.kernels.small_linear_kernels import few_rows_kernel, more_rows_kernel
from tessera.kernels.small_linear_tiles import few_rows_tiles, more_rows_tiles

EPS = 1e-6
ROWS = (1, 2, 3, 4, 9)
every_count = pytest.mark.parametrize("num_rows", ROWS)
SHAPES = [(960, 576), (3072, 576), (576, 1536), (576, 576), (4096, 1024), (6144, 1024), (1024, 3072), (1024, 2048),
          (6144, 4096), (28672, 4096), (4096, 14336)]  # fmt: skip
"""[outputs, inputs] of SmolLM2-135M, Qwen3-0.6B and Llama-3-8B."""
PRODUCTS: dict[str, dict[str, bool]] = {
    "norm + qkv": {"norm": True, "bias": True},
    "output + residual": {"residual": True},
    "norm + gate_up + SwiGLU": {"norm": True, "gated": True, "bias": True},
    "plain": {},
}
every_product = pytest.mark.parametrize("parts", PRODUCTS.values(), ids=PRODUCTS)


def arguments(
    num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype, *, norm: bool = False, bias: bool = False,
    residual: bool = False, gated: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Of `small_linear`, on the CPU in float32, of numbers that the dtype has."""
    generator = torch.Generator().manual_seed(num_rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).float()

    weight_rows = num_outputs * (1 + gated)
    return {
        "x": draw(num_rows, num_inputs) * 4,
        "weight": draw(weight_rows, num_inputs).div(num_inputs**0.5).to(dtype).float(),
        "bias": draw(weight_rows) if bias else None,
        "norm": Norm(draw(num_inputs), EPS) if norm else None,
        "residual": draw(num_rows, num_outputs) if residual else None,
        "gated": gated,
    }


def by_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, residual: Tensor | None, gated: bool
) -> Tensor:
    """The same in float64."""
    hidden = x.double()
    if norm is not None:
        hidden = functional.rms_norm(hidden, x.shape[1:], norm.weight.double(), norm.eps)
    hidden = functional.linear(hidden, weight.double(), None if bias is None else bias.double())
    if gated:
        gate, up = hidden.chunk(2, 1)
        hidden = functional.silu(gate) * up
    return hidden if residual is None else hidden + residual


def placed(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments on the device under test."""

    def place(value: Any) -> Any:
        if isinstance(value, Norm):
            return Norm(value.weight.to(DEVICE, dtype), value.eps)
        return value.to(DEVICE, dtype) if isinstance(value, Tensor) else value

    arguments = {name: place(value) for name, value in given.items()}
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # weights may be read before launches that still write are waited for
    return arguments


@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
@every_count
@every_product
def test_it_equals_float64_to_one_rounding(dtype: torch.dtype, num_rows: int, parts: dict[str, bool]) -> None:
    given = arguments(num_rows, 22, 600, dtype, **parts)
    expected = by_torch(**given)
    found = small_linear(**placed(given, dtype))
    assert found.dtype == dtype and found.is_contiguous()
    exact = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    rounded_norm = dtype != torch.float32 and num_rows > 4 and "norm" in parts  # tensor cores take half types only
    tolerance = exact * (4 if rounded_norm else 1.02)
    atol = 3e-6 if not rounded_norm else tolerance
    torch.testing.assert_close(found.cpu().double(), expected, atol=atol, rtol=tolerance)


@needs_kernels
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "parts"),
    [
        (1, 8, {"norm": True, "gated": True}),
        (3, 256, {"residual": True}),
        (4, 1000, {"norm": True, "gated": True}),
        (34, 2056, {"residual": True}),
        (34, 2056, {"norm": True, "gated": True}),
        (3, 16392, {"norm": True, "residual": True}),
    ],
)
@pytest.mark.parametrize("num_rows", [1, 4, 7])
def test_any_size_is_multiplied_whole(num_outputs: int, num_inputs: int, parts: dict[str, bool], num_rows: int) -> None:
    given = arguments(num_rows, num_outputs, num_inputs, torch.float32, **parts)
    found = small_linear(**placed(given, torch.float32))
    torch.testing.assert_close(found.cpu().double(), by_torch(**given), atol=1e-5, rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize("counts", [(1, 2, 3, 4), (5, 9, 16)])
@every_product
def test_a_row_has_the_same_bits_in_any_batch_of_its_kernel(counts: tuple[int, ...], parts: dict[str, bool]) -> None:
    given = placed(arguments(16, 14, 1100, torch.float16, **parts), torch.float16)  # 1100: two warps add up
    all_rows = {"x": given.pop("x"), "residual": given.pop("residual")}
    answers = []
    for count in counts:
        rows: dict[str, Any] = {
            name: None if x is None else x[5 - min(counts) :][:count] for name, x in all_rows.items()
        }
        answers.append(small_linear(**rows, **given)[: min(counts)])
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@needs_kernels
@pytest.mark.parametrize("num_rows", [3, 6])
def test_rows_may_lie_apart_and_what_is_given_stays(num_rows: int) -> None:
    given = placed(arguments(num_rows, 20, 96, torch.float32, norm=True, residual=True), torch.float32)
    apart = dict(given)
    for name in ("x", "residual"):
        wide = torch.full((num_rows, given[name].shape[1] + 24), 1e9, device=DEVICE)
        wide[:, 8:-16] = given[name]
        apart[name] = wide[:, 8:-16]
    before = {name: given[name].clone() for name in ("x", "residual")}
    assert torch.equal(small_linear(**apart), small_linear(**given))
    assert all(torch.equal(given[name], value) for name, value in before.items())
    transposed = given | {"x": given["x"].t().contiguous().t()}
    assert torch.equal(small_linear(**transposed), small_linear(**given))


@needs_kernels
@pytest.mark.parametrize("num_rows", [1, 5])
def test_large_numbers_are_squared_and_gated_without_overflow(num_rows: int) -> None:
    x = torch.full((num_rows, 64), 300.0, dtype=torch.float16, device=DEVICE)  # whose squares float16 has not
    weight = torch.full((4, 64), 10.0, dtype=torch.float16, device=DEVICE)
    weight[:2] *= torch.tensor([[-1.0], [1.0]], device=DEVICE)
    norm = Norm(torch.ones(64, dtype=torch.float16, device=DEVICE), EPS)
    assert small_linear(x, weight, norm=norm).tolist() == [[-640.0, 640.0, 640.0, 640.0]] * num_rows
    gated = small_linear(x, weight / 10, norm=norm, gated=True)  # silu(-64), silu(64)
    assert gated.tolist() == [[0.0, 4096.0]] * num_rows


@needs_kernels
def test_zeros_and_negative_zeros_give_zeros() -> None:
    norm = Norm(torch.ones(40, device=DEVICE), EPS)
    assert not small_linear(torch.zeros(2, 40, device=DEVICE), torch.ones(8, 40, device=DEVICE), norm=norm).any()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, MORE_ROWS), (torch.float16, MAX_ROWS)])
def test_so_many_rows_are_served(dtype: torch.dtype, most: int) -> None:
    weight = torch.zeros(8, 4, dtype=dtype)
    assert [rows for rows in range(300) if serves_small(rows, weight)] == list(range(1, most + 1))
    assert not serves_small(1, weight.t()) and not serves_small(1, torch.zeros(0))  # transposed; packed
    with pytest.raises(ValueError, match=f"{most + 1} rows times a weight of \\(8, 4\\)"):
        small_linear(torch.zeros(most + 1, 4, dtype=dtype), weight)
    with pytest.raises(ValueError, match="17 rows times a weight"):
        small_linear(torch.zeros(17, 4, dtype=dtype), weight, norm=Norm(torch.ones(4, dtype=dtype), EPS))


def test_programs_keep_an_h200_busy_and_add_up_in_one_order() -> None:
    for num_outputs, num_inputs in SHAPES:
        tiles = [few_rows_tiles(rows, num_outputs, num_inputs) for rows in (1, 2, 3, 4)]
        assert len({(t.chunk, t.num_warps) for t in tiles}) == 1  # the order of a sum, whatever the number of rows
        for t in tiles:
            assert num_outputs / t.tile >= 132 and t.held * t.tile <= 16 and t.rows * t.tile * 8 <= 128
        more = more_rows_tiles(num_outputs, num_inputs, 2)
        assert num_outputs / more.tile >= min(132, num_outputs / 16) and more.tile * more.lines <= 512


def variants() -> Iterator[tuple[int, int, int, dict[str, bool]]]:
    for (num_outputs, num_inputs), parts in (
        (SHAPES[0], {"NORM": True}), (SHAPES[5], {"NORM": True, "GATED": True}),
        (SHAPES[6], {"RESIDUAL": True}), (SHAPES[10], {"RESIDUAL": True, "BIAS": True}),
    ):  # fmt: skip
        for num_rows in (1, 4, 16):
            yield num_outputs, num_inputs, num_rows, parts


def compiled(num_outputs: int, num_inputs: int, num_rows: int, parts: dict[str, bool], *, pdl: bool) -> str:
    constants: dict[str, Any] = dict.fromkeys(("NORM", "BIAS", "RESIDUAL", "GATED"), False)
    constants |= parts | {"K": num_inputs, "PDL": pdl}
    kinds = dict.fromkeys(("x", "weight", "bias", "norm_weight", "residual", "out"), "*bf16") | {"eps": "fp32"}
    if num_rows <= 4:
        few = few_rows_tiles(num_rows, num_outputs, num_inputs)
        constants |= {"ROWS": few.rows, "TILE": few.tile, "CHUNK": few.chunk, "HELD": few.held}
        return compile_for_hopper(few_rows_kernel, kinds, constants, few.num_warps)
    more = more_rows_tiles(num_outputs, num_inputs, 2)
    sizes = {"ROWS": 16, "TILE": more.tile, "CHUNK": more.chunk, "STAGES": more.stages, "LINES": more.lines}
    return compile_for_hopper(more_rows_kernel, kinds, constants | sizes, more.num_warps)


@needs_compiler
@pytest.mark.parametrize(("num_outputs", "num_inputs", "num_rows", "parts"), list(variants()))
def test_on_hopper_weights_are_under_way_before_it_waits(
    num_outputs: int, num_inputs: int, num_rows: int, parts: dict[str, bool]
) -> None:
    ptx = compiled(num_outputs, num_inputs, num_rows, parts, pdl=True)
    before, _, after = ptx.partition("griddepcontrol.wait")
    num_loads = loads_before_waiting(ptx)
    if num_rows > 4:
        assert "prefetch.global.L2" in before and num_loads == 0
        assert re.search(r"cp\.async\.c[ag]\.shared\.global[^;]*0x10", after) and "mma" in after
        return
    few = few_rows_tiles(num_rows, num_outputs, num_inputs)
    wide = r"ld\.global\S*\.v4\.b32"
    assert len(re.findall(wide, before)) == few.held * few.tile == num_loads
    loads_and_sums = after[: [match.end() for match in re.finditer(wide, after)][-1]]
    assert "bar.sync" not in loads_and_sums and "shared" not in loads_and_sums  # threads keep to themselves
    assert ptx.count("bar.sync") <= 8 and ptx.count("st.shared") <= 32  # and all rows meet at once


@needs_compiler
@pytest.mark.parametrize("num_rows", [1, 16])
def test_without_dependent_launches_nothing_waits(num_rows: int) -> None:
    ptx = compiled(576, 576, num_rows, {}, pdl=False)
    assert "griddepcontrol" not in ptx and "prefetch" not in ptx


@needs_cuda
@pytest.mark.parametrize("num_rows", [1, 4, 16])
@pytest.mark.parametrize("pdl", [False, True])
def test_a_graph_of_a_chain_replays_on_what_its_input_then_holds(num_rows: int, pdl: bool) -> None:
    if pdl and not pdl_on(torch.device("cuda")):
        pytest.skip("a GPU from Hopper on is needed")
    hidden = torch.randn(num_rows, 512, device=DEVICE, dtype=torch.bfloat16)
    weights = [torch.randn(512, 512, device=DEVICE, dtype=torch.bfloat16) / 22 for _ in range(8)]
    norm = Norm(torch.ones(512, device=DEVICE, dtype=torch.bfloat16), EPS)

    def chain(with_pdl: bool) -> Tensor:
        out = hidden
        for weight in weights:
            out = small_linear(small_linear(out, weight, norm=norm, pdl=with_pdl), weight, residual=out, pdl=with_pdl)
        return out

    chain(pdl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(pdl)
    for _ in range(20):
        hidden.normal_()
        graph.replay()
        assert torch.equal(out, chain(False))


SIZES = [(1, *shape, torch.bfloat16) for shape in SHAPES]
SIZES += [(rows, *SHAPES[at], torch.bfloat16) for rows in (4, 16) for at in (0, 2, 5, 9, 10)]
SIZES += [(rows, 576, 1536, dtype) for rows in (4, 16) for dtype in (torch.float32, torch.float16)]
SIZES += [(rows, 1024, 3072, torch.float32) for rows in (1, 16)]
"""Rows, outputs, inputs: each is compiled anew, so every shape once and every table's rows with every kernel."""


@needs_cuda
@pytest.mark.parametrize(("num_rows", "num_outputs", "num_inputs", "dtype"), SIZES)
def test_models_sizes_on_the_gpu(num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> None:
    x, weight = (torch.randn(rows, num_inputs, device=DEVICE).to(dtype) for rows in (num_rows, num_outputs))
    expected = x.double() @ weight.double().t()
    torch.cuda.synchronize()  # weights may be read before launches that still write are waited for
    # Sums of k products of size 1 grow as sqrt(k), and each is rounded by 0.29 places on average: K such roundings come
    # to 0.29 / sqrt(2) * K places of 1, of which this is six times.
    added_up = 1.2 * torch.finfo(torch.float32).eps * num_inputs
    eps = torch.finfo(dtype).eps
    atol, rtol = (added_up, 1e-5) if dtype == torch.float32 else (8 * eps, 0.505 * eps)
    torch.testing.assert_close(small_linear(x, weight).double(), expected, atol=atol, rtol=rtol)
