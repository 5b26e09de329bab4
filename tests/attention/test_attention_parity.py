from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_workloads import DEVICES, WORKLOADS, Workload, make_case, make_shape
from tessera.attention.backends.naive import Naive
from tessera.attention.backends.torch_sdpa import TorchSdpa
from tessera.attention.contract import AttentionBackend, Phase

Backend = type[AttentionBackend[Any]]

every_backend = pytest.mark.parametrize("backend", [Naive, TorchSdpa], ids=lambda backend: backend.name)
every_device = pytest.mark.parametrize("device", DEVICES)
every_phase = pytest.mark.parametrize("phase", list(Phase))
PHASE_AND_NAME = [(phase, name) for phase, of_phase in WORKLOADS.items() for name in of_phase]
MIXED = {
    Phase.DECODE: Workload(((1, 70), (1, 3), (1, 129))),
    Phase.PREFILL: Workload(((19, 19), (7, 40))),
}


@every_backend
@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("phase", "name"), PHASE_AND_NAME)
def test_workload_equals_the_oracle(backend: Backend, device: str, dtype: torch.dtype, phase: Phase, name: str) -> None:
    workload = WORKLOADS[phase][name]
    make_case(workload, make_shape(dtype=dtype, device=device, window=workload.window)).check(backend, phase)


@every_backend
@every_device
@every_phase
@pytest.mark.parametrize("head_dim", [32, 64, 72, 80, 96, 112, 128, 160, 256])
def test_head_dim_equals_the_oracle(backend: Backend, device: str, phase: Phase, head_dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        make_case(MIXED[phase], make_shape(head_dim=head_dim, dtype=dtype, device=device)).check(backend, phase)


@every_backend
@every_device
@every_phase
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (9, 3), (8, 2), (16, 2), (7, 1), (1, 1), (10, 2)])
def test_head_groups_equal_the_oracle(backend: Backend, device: str, phase: Phase, q_heads: int, kv_heads: int) -> None:
    make_case(MIXED[phase], make_shape(q_heads=q_heads, kv_heads=kv_heads, device=device)).check(backend, phase)


@every_backend
@every_device
@pytest.mark.parametrize("page_size", [1, 16, 24, 64, 256])
@pytest.mark.parametrize("ordered_pages", [False, True], ids=["shuffled", "ordered"])
@pytest.mark.parametrize(("phase", "name"), PHASE_AND_NAME)
def test_pages_of_any_size_and_order_equal_the_oracle(
    backend: Backend, device: str, page_size: int, ordered_pages: bool, phase: Phase, name: str
) -> None:
    workload = WORKLOADS[phase][name]
    shape = make_shape(page_size=page_size, device=device, window=workload.window)
    make_case(workload, shape, ordered_pages=ordered_pages).check(backend, phase)


@every_backend
@every_device
@every_phase
def test_queries_may_be_a_slice_of_a_wider_tensor(backend: Backend, device: str, phase: Phase) -> None:
    """Models hand over the q part of a fused projection: strided, not contiguous."""
    case = make_case(MIXED[phase], make_shape(device=device))
    wide = torch.full((len(case.q), 10, 32), torch.nan, device=device)
    wide[:, :6] = case.q
    bound = backend(phase, case.shape)
    answer = bound.run(bound.plan(case.batch), wide[:, :6], case.k_pages, case.v_pages)
    torch.testing.assert_close(answer.double(), case.reference(), atol=1e-5, rtol=1e-5)


@every_backend
@every_device
def test_padding_sequences_give_finite_rows_and_disturb_no_other(backend: Backend, device: str) -> None:
    """A padded decode batch (kv_len 0, page table 0) attends to something finite: NaN would spread."""
    shape = make_shape(device=device)
    alone = make_case(Workload(((1, 20), (1, 70))), shape)
    padded = make_case(Workload(((1, 20), (1, 70), (1, 0), (1, 0))), shape)
    padded.q[:2] = alone.q
    table = torch.zeros_like(padded.batch.page_table)
    table[:2] = alone.batch.page_table
    padded.batch.page_table.copy_(table)
    bound = backend(Phase.DECODE, shape)
    answer = bound.run(bound.plan(padded.batch), padded.q, alone.k_pages, alone.v_pages)
    assert answer.isfinite().all()
    torch.testing.assert_close(answer[:2].double(), alone.reference(), atol=1e-5, rtol=1e-5)


@every_backend
@every_device
@every_phase
def test_one_instance_serves_steps_of_changing_size(backend: Backend, device: str, phase: Phase) -> None:
    """Buffers and masks kept between steps must not leak one step's contents into the next."""
    shape = make_shape(device=device, window=50)
    bound = backend(phase, shape)
    for name in [*WORKLOADS[phase], *reversed(WORKLOADS[phase])]:
        case = make_case(WORKLOADS[phase][name], shape)
        answer = bound.run(bound.plan(case.batch), case.q, case.k_pages, case.v_pages)
        torch.testing.assert_close(answer.double(), case.reference(), atol=1e-5, rtol=1e-5)


@st.composite
def ragged_cases(draw: st.DrawFn) -> tuple[Phase, Workload, dict[str, Any]]:
    phase = draw(st.sampled_from(list(Phase)))
    q_lens = st.just(1) if phase is Phase.DECODE else st.integers(1, 300)
    lens = st.tuples(q_lens, st.integers(0, 300)).map(lambda pair: (pair[0], pair[0] + pair[1]))
    window = draw(st.none() | st.integers(1, 400))
    workload = Workload(tuple(draw(st.lists(lens, min_size=1, max_size=9))), window)
    kv_heads = draw(st.integers(1, 3))
    sizes = {
        "kv_heads": kv_heads,
        "q_heads": kv_heads * draw(st.integers(1, 5)),
        "head_dim": 8 * draw(st.integers(1, 8)),
        "page_size": draw(st.integers(1, 80)),
    }
    return phase, workload, sizes


@every_backend
@given(case=ragged_cases(), seed=st.integers(0, 1000), ordered_pages=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_random_ragged_batches_equal_the_oracle(
    backend: Backend, case: tuple[Phase, Workload, dict[str, Any]], seed: int, ordered_pages: bool
) -> None:
    phase, workload, sizes = case
    shape = make_shape(window=workload.window, **sizes)
    make_case(workload, shape, seed=seed, ordered_pages=ordered_pages).check(backend, phase)
