"""Norm, rotation and page write in one launch give what torch's operators give one after the other."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tessera.kernels.pages import write_pages
from tessera.kernels.turn import Turn
from tessera.model.layers.norm import RMSNorm
from tessera.model.layers.parameter import Placement
from tessera.model.layers.rope import RotaryEmbedding, rotate
from tessera.model.spec import Rope
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
from tessera.kernels.rope_pages import rope_pages, rope_pages_kernel

EPS = 1e-6
CPU = torch.device("cpu")
SLOTS = [37, -1, 0, 63, -1, 8, 9]


class Heads(NamedTuple):
    """How many heads of queries and of keys, and of what size."""

    q: int
    kv: int
    dim: int


class Case(NamedTuple):
    """One step's heads, as slices of one product, and pools with something in them; all on a CPU."""

    q: Tensor
    k: Tensor
    v: Tensor
    turn: Turn
    k_pages: Tensor
    v_pages: Tensor
    slots: Tensor


def make_case(heads: Heads, dtype: torch.dtype, *, norm: bool, rope: bool, slots: list[int] = SLOTS) -> Case:
    torch.manual_seed(0)
    fused = torch.randn(len(slots), heads.q + 2 * heads.kv, heads.dim).to(dtype)
    q, k, v = torch.split(fused, [heads.q, heads.kv, heads.kv], 1)
    weights = tuple((torch.randn(2, heads.dim) + 1).to(dtype)) if norm else (None, None)
    positions = torch.randint(0, 5000, (len(slots),))
    rotation = RotaryEmbedding(Rope(theta=10_000.0), heads.dim, CPU)(positions, dtype) if rope else None
    k_pages, v_pages = torch.randn(2, 4, 16, heads.kv, heads.dim).to(dtype).unbind(0)
    return Case(
        q, k, v, Turn(weights[0], weights[1], EPS, rotation), k_pages.clone(), v_pages.clone(), torch.tensor(slots)
    )


def by_torch(case: Case) -> Case:
    """What torch's operators make of a case: the turned q, and pools that are written."""
    q, k, turn = case.q, case.k, case.turn
    if turn.q_weight is not None and turn.k_weight is not None:
        q, k = (_normed(x, weight) for x, weight in ((q, turn.q_weight), (k, turn.k_weight)))
    if turn.rotation is not None:
        q, k = rotate(q, turn.rotation), rotate(k, turn.rotation)
    k_pages, v_pages = case.k_pages.clone(), case.v_pages.clone()
    write_pages(k, case.v, k_pages, v_pages, case.slots, padded=True)
    return case._replace(q=q, k_pages=k_pages, v_pages=v_pages)


def _normed(heads: Tensor, weight: Tensor) -> Tensor:
    norm = RMSNorm(heads.shape[-1], EPS, Placement(heads.dtype, CPU))
    norm.weight.copy_(weight)
    normed: Tensor = norm(heads)
    return normed


def by_kernel(case: Case) -> Case:
    """What the kernel makes of it."""
    rotation = case.turn.rotation and (case.turn.rotation[0].to(DEVICE), case.turn.rotation[1].to(DEVICE))
    weights = [None if weight is None else weight.to(DEVICE) for weight in case.turn[:2]]
    k_pages, v_pages = case.k_pages.to(DEVICE, copy=True), case.v_pages.to(DEVICE, copy=True)
    fused = torch.cat((case.q, case.k, case.v), 1).to(DEVICE)
    q, k, v = torch.split(fused, [case.q.shape[1], case.k.shape[1], case.v.shape[1]], 1)
    out = rope_pages(q, k, v, Turn(weights[0], weights[1], EPS, rotation), k_pages, v_pages, case.slots.to(DEVICE))
    assert out.is_contiguous()
    assert torch.equal(fused.cpu().nan_to_num(), torch.cat((case.q, case.k, case.v), 1).nan_to_num())
    return case._replace(q=out.cpu(), k_pages=k_pages.cpu(), v_pages=v_pages.cpu())


def check(case: Case) -> None:
    """Half types: equal but for one in a hundred, and those within a place of the last; v always to the bit.

    In float32, where nothing hides it, a norm's other order of adding shows, and differences of large numbers more.
    """
    found, expected = by_kernel(case), by_torch(case)
    for mine, theirs in ((found.q, expected.q), (found.k_pages, expected.k_pages)):
        eps = torch.finfo(mine.dtype).eps * (8 if mine.dtype == torch.float32 else 1)
        torch.testing.assert_close(mine, theirs, rtol=eps, atol=2 * eps)
        if mine.dtype != torch.float32:
            assert (mine != theirs).float().mean() < 0.01
    assert torch.equal(found.v_pages, expected.v_pages)
    untouched = torch.ones(64, dtype=torch.bool)
    untouched[case.slots[case.slots >= 0]] = False
    assert torch.equal(found.k_pages.flatten(0, 1)[untouched], case.k_pages.flatten(0, 1)[untouched])


@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@every_dtype
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rope", [False, True])
def test_norm_rotation_and_write_equal_torchs(dtype: torch.dtype, norm: bool, rope: bool) -> None:
    check(make_case(Heads(16, 8, 128), dtype, norm=norm, rope=rope))


@needs_kernels
@pytest.mark.parametrize(
    "heads", [Heads(9, 3, 64), Heads(32, 8, 128), Heads(4, 4, 80), Heads(3, 1, 20), Heads(71, 1, 64), Heads(1, 1, 256)]
)
def test_any_heads_are_served(heads: Heads) -> None:
    check(make_case(heads, torch.float16, norm=True, rope=True))


@needs_kernels
def test_an_odd_head_is_normed_and_written_whole() -> None:
    check(make_case(Heads(2, 2, 15), torch.float16, norm=True, rope=False))


@needs_kernels
def test_nothing_to_do_to_heads_still_writes_them() -> None:
    case = make_case(Heads(4, 2, 64), torch.float16, norm=False, rope=False)
    found, expected = by_kernel(case), by_torch(case)
    assert all(ulps_apart(*pair) == 0 for pair in zip(found[:1] + found[4:6], expected[:1] + expected[4:6]))


@needs_kernels
@pytest.mark.parametrize("slots", [[-1], [-1, -1, -1], [-1, 19, -5], [5]], ids=str)
def test_padding_of_nan_is_skipped_and_goes_nowhere(slots: list[int]) -> None:
    case = make_case(Heads(4, 2, 32), torch.float16, norm=True, rope=True, slots=slots)
    for x in (case.q, case.k, case.v):
        x[case.slots < 0] = torch.nan
    found, expected = by_kernel(case), by_torch(case)
    assert found.k_pages.isfinite().all() and found.v_pages.isfinite().all()
    assert ulps_apart(found.k_pages, expected.k_pages) <= 1
    assert torch.equal(found.v_pages, expected.v_pages)
    assert found.q[case.slots >= 0].isfinite().all()


@needs_kernels
def test_a_step_without_tokens_is_nothing() -> None:
    case = by_kernel(make_case(Heads(4, 2, 32), torch.float16, norm=True, rope=True, slots=[]))
    assert case.q.shape == (0, 4, 32)


@needs_compiler
@pytest.mark.parametrize(("heads", "norm"), [(Heads(9, 3, 64), False), (Heads(16, 8, 128), True)])
def test_it_compiles_for_hopper_with_wide_loads(heads: Heads, norm: bool) -> None:
    pointers = ("q", "k", "v", "out", "k_pages", "v_pages", "q_weight", "k_weight", "cosines", "sines")
    strides = ("Q_HEAD_STRIDE", "K_HEAD_STRIDE", "V_HEAD_STRIDE", "K_PAGE_HEAD_STRIDE", "V_PAGE_HEAD_STRIDE")
    constants = dict.fromkeys(strides, heads.dim) | {"Q_HEADS": heads.q, "KV_HEADS": heads.kv, "HEAD_DIM": heads.dim}
    constants |= {"HEADS": 1024 // heads.dim, "PAD": heads.dim // 2, "NORM": norm, "ROPE": True, "PDL": True}
    kinds = dict.fromkeys(pointers, "*bf16") | {"slots": "*i64", "eps": "fp32"}
    ptx = compile_for_hopper(rope_pages_kernel, kinds, constants, 2)
    assert "ld.global.v4.b32" in ptx
    assert loads_before_waiting(ptx) == 0


@needs_cuda
def test_a_graph_replays_on_what_its_inputs_then_hold() -> None:
    case = make_case(Heads(9, 3, 64), torch.bfloat16, norm=True, rope=True)
    q, k, v, k_pages, v_pages, slots = (x.to(DEVICE) for x in (*case[:3], *case[4:]))
    weights = [weight.to(DEVICE) for weight in case.turn[:2] if weight is not None]
    assert case.turn.rotation is not None
    turn = Turn(weights[0], weights[1], EPS, (case.turn.rotation[0].to(DEVICE), case.turn.rotation[1].to(DEVICE)))
    rope_pages(q, k, v, turn, k_pages.clone(), v_pages.clone(), slots)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rope_pages(q, k, v, turn, k_pages, v_pages, slots)
    for x in (q, k, v):
        x.normal_()
    slots.copy_(torch.tensor([1, 2, -1, -1, 50, 51, -1]))
    wanted = k_pages.clone(), v_pages.clone()
    expected = rope_pages(q, k, v, turn, *wanted, slots)
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(k_pages, wanted[0]) and torch.equal(v_pages, wanted[1])
