"""RMSNorm in one launch, with and without the sum before it, gives what torch's operators give."""

from __future__ import annotations

import pytest
import torch

from tessera.model.layers.norm import RMSNorm
from tessera.model.layers.parameter import Placement
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
from tessera.kernels.norm import add_rms_norm, rms_norm, rms_norm_kernel

EPS = 1e-5
every_size = pytest.mark.parametrize("size", [32, 576, 1000, 4096])


def make_norm(size: int, dtype: torch.dtype, *, fused: bool = False, device: str = "cpu") -> RMSNorm:
    """The layer by torch's operators, or by the kernels; the same weights whichever."""
    norm = RMSNorm(size, EPS, Placement(dtype, torch.device(device)), fused=fused)
    norm.weight.copy_(torch.randn(size, generator=torch.Generator().manual_seed(size)))
    return norm


def most_ulps(dtype: torch.dtype) -> int:
    """Squares are added up in another order: in half types that is rounded away but for borders."""
    return 8 if dtype == torch.float32 else 1


@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@every_dtype
@every_size
def test_norm_equals_torch_to_the_last_place(dtype: torch.dtype, size: int) -> None:
    norm = make_norm(size, dtype)
    hidden = (torch.randn(5, size) * 300).to(dtype)  # squares of such values overflow float16
    found = rms_norm(hidden.to(DEVICE), norm.weight.to(DEVICE), EPS)
    assert ulps_apart(found, norm(hidden)) <= most_ulps(dtype)


@needs_kernels
@every_dtype
@every_size
def test_sum_has_torchs_bits_and_is_normed_as_it_was_rounded(dtype: torch.dtype, size: int) -> None:
    norm = make_norm(size, dtype)
    hidden, update = ((torch.randn(5, size) * spread).to(dtype) for spread in (30, 0.7))
    before = hidden.clone(), update.clone()
    given = hidden.to(DEVICE), update.to(DEVICE)
    total, found = add_rms_norm(*given, norm.weight.to(DEVICE), EPS)
    expected_total, expected = norm.add(hidden, update)
    assert torch.equal(total.cpu(), expected_total)
    assert ulps_apart(found, expected) <= most_ulps(dtype)
    if dtype != torch.float32:  # one in three differs where the sum is not rounded before it is normed
        assert (found.cpu() != expected).float().mean() < 0.01
    assert all(torch.equal(x.cpu(), y) for x, y in zip(given, before))


@needs_kernels
def test_any_leading_shape_and_stride_is_taken() -> None:
    weight = torch.randn(16, device=DEVICE)
    heads = torch.randn(3, 7, 40, device=DEVICE)[:, 1:5, 8:24]
    assert torch.equal(rms_norm(heads, weight, EPS), rms_norm(heads.contiguous(), weight, EPS))
    total, found = add_rms_norm(heads, heads, weight, EPS)
    assert torch.equal(total, heads + heads) and found.shape == heads.shape
    assert rms_norm(heads[:0], weight, EPS).shape == (0, 4, 16)


@needs_kernels
def test_zeros_stay_zeros() -> None:
    assert not rms_norm(torch.zeros(2, 24, device=DEVICE), torch.ones(24, device=DEVICE), EPS).any()


@needs_kernels
@every_dtype
def test_the_fused_layer_answers_as_the_plain_one(dtype: torch.dtype) -> None:
    plain, fused = make_norm(576, dtype), make_norm(576, dtype, fused=True, device=DEVICE)
    hidden, update = torch.randn(2, 3, 576).to(dtype)
    assert ulps_apart(fused(hidden.to(DEVICE)), plain(hidden)) <= most_ulps(dtype)
    for found, expected in zip(fused.add(hidden.to(DEVICE), update.to(DEVICE)), plain.add(hidden, update)):
        assert ulps_apart(found, expected) <= most_ulps(dtype)


@needs_kernels
def test_a_row_has_the_same_bits_in_any_batch() -> None:
    hidden, weight = torch.randn(9, 576, device=DEVICE), torch.randn(576, device=DEVICE)
    assert torch.equal(rms_norm(hidden, weight, EPS)[4:5], rms_norm(hidden[4:5], weight, EPS))


@needs_compiler
@pytest.mark.parametrize("add", [False, True])
def test_it_compiles_for_hopper_with_wide_loads(add: bool) -> None:
    kinds = dict.fromkeys(("hidden", "update", "weight", "total", "out"), "*bf16") | {"eps": "fp32"}
    constants = {"SIZE": 4096, "BLOCK": 4096, "ADD": add, "PDL": True}
    ptx = compile_for_hopper(rms_norm_kernel, kinds, constants, 8)
    assert "ld.global.v4.b32" in ptx
    assert loads_before_waiting(ptx) == 2  # of the weight, 32 bytes a thread


@needs_cuda
def test_a_graph_replays_on_what_its_input_then_holds() -> None:
    hidden, update = torch.randn(2, 8, 576, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(576, device=DEVICE, dtype=torch.bfloat16)
    add_rms_norm(hidden, update, weight, EPS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = add_rms_norm(hidden, update, weight, EPS)
    hidden.normal_()
    update.normal_()
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(out, add_rms_norm(hidden, update, weight, EPS)))
