"""Pools of more than 2^31 numbers: tokens at their far end are read and written where they lie.

Of the pools nothing is touched but these tokens, so that on a CPU they take addresses and no memory.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tessera.attention.contract import Phase, Shape
from tessera.attention.registry import load_checked
from tessera.attention.workloads import Case, Workload, make_case
from triton_interpreter import DEVICE, check_in_interpreter, needs_kernels, outside_interpreter

pytest.importorskip("triton", reason="triton is not installed")
from tessera.kernels.rope_pages import rope_pages
from tessera.kernels.turn import Turn

DECODES = ("triton", "triton:paged", "triton:flash_decoding", "triton:flash_decoding_pp")
PREFILLS = ("triton:two_pass", "triton:fa1", "triton:fa2")


def make_shape() -> Shape:
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
    return Shape(6, 2, 32, 32**-0.5, torch.float16, DEVICE, capability, 16)


def enlarge(pool: Tensor) -> Tensor:
    """The same pages behind 2^31 numbers that are nothing."""
    large = pool.new_empty(2**31 // pool[0].numel() + len(pool), *pool.shape[1:])
    large[-len(pool) :] = pool
    return large


def move_far(case: Case) -> Case:
    """The same call with its pages at the end of large pools."""
    k, v = enlarge(case.k), enlarge(case.v)
    table = case.batch.page_table + (len(k) - len(case.k))
    return replace(case, k=k, v=v, batch=replace(case.batch, page_table=table, num_pages=len(k)))


@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "phase"), [(n, Phase.DECODE) for n in DECODES] + [(n, Phase.PREFILL) for n in PREFILLS]
)
def test_far_pages_are_read_as_near_ones(name: str, phase: Phase) -> None:
    lens = ((1, 40), (1, 5)) if phase is Phase.DECODE else ((3, 40), (5, 5))
    case, backend = make_case(phase, Workload(lens), make_shape()), load_checked(name)
    assert torch.equal(move_far(case).answer(backend), case.answer(backend))


@needs_kernels
def test_far_slots_are_written() -> None:
    q, k, v = (torch.randn(2, heads, 32, device=DEVICE).half() for heads in (6, 2, 2))
    k_pages, v_pages = (enlarge(torch.zeros(1, 16, 2, 32, dtype=torch.float16, device=DEVICE)) for _ in range(2))
    last = len(k_pages) * 16 - 1
    rope_pages(q, k, v, Turn(), k_pages, v_pages, torch.tensor([last, last - 5], device=DEVICE))
    for values, pool in ((k, k_pages), (v, v_pages)):
        assert torch.equal(pool[-1, [15, 10]], values)
