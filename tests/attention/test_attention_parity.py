from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_cases import DEVICES, PAGED, check, make_shape
from tessera.attention.backends.naive import Naive
from tessera.attention.backends.torch_sdpa import (
    TorchSdpa,
    TorchSdpaCudnn,
    TorchSdpaEfficient,
    TorchSdpaFlash,
    TorchSdpaMath,
)
from tessera.attention.backends.xformers import XFormers
from tessera.attention.contract import AttentionBackend, Phase, is_installed
from tessera.attention.workloads import WORKLOADS, Workload, make_case

Backend = type[AttentionBackend[Any]]

ALL: list[Backend] = [Naive, TorchSdpa, TorchSdpaFlash, TorchSdpaMath, TorchSdpaCudnn, TorchSdpaEfficient, XFormers]
"""Flex, which compiles for seconds, has tests of its own."""
HERE = [
    pytest.param(backend, device, id=f"{backend.name}-{device}")
    for backend in ALL
    for device in DEVICES
    if device in backend.limits[Phase.DECODE].devices and all(map(is_installed, backend.needs))
]
every_backend = pytest.mark.parametrize(("backend", "device"), HERE)
every_phase = pytest.mark.parametrize("phase", list(Phase))
PHASE_AND_NAME = [(phase, name) for phase, of_phase in WORKLOADS.items() for name in of_phase]
MIXED = {
    Phase.DECODE: Workload(((1, 70), (1, 3), (1, 129))),
    Phase.PREFILL: Workload(((19, 19), (7, 40))),
    Phase.VISION: Workload(((19, 19), (7, 7), (7, 7), (65, 65))),
}


def check_or_refuse(backend: Backend, phase: Phase, workload: Workload, **sizes: Any) -> None:
    """The answer is the oracle's; where the backend refuses what its limits allow, the test is skipped with why."""
    shape = workload.bind(phase, make_shape(**sizes))
    reasons = backend.reasons_against(phase, shape)
    if not backend.limits[phase].problems(shape):
        if reasons:
            pytest.skip("; ".join(reasons))
        check(make_case(phase, workload, shape), backend)
    assert bool(reasons) == bool(backend.limits[phase].problems(shape))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("phase", "name"), PHASE_AND_NAME)
def test_workload_equals_the_oracle_or_is_refused(
    backend: Backend, device: str, dtype: torch.dtype, phase: Phase, name: str
) -> None:
    check_or_refuse(backend, phase, WORKLOADS[phase][name], dtype=dtype, device=device)


@every_backend
@every_phase
@pytest.mark.parametrize("head_dim", [32, 64, 72, 80, 96, 112, 128, 160, 256])
def test_head_dim_equals_the_oracle(backend: Backend, device: str, phase: Phase, head_dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_or_refuse(backend, phase, MIXED[phase], head_dim=head_dim, dtype=dtype, device=device)


@every_backend
@every_phase
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (9, 3), (8, 2), (16, 2), (7, 1), (1, 1), (10, 2)])
def test_head_groups_equal_the_oracle(backend: Backend, device: str, phase: Phase, q_heads: int, kv_heads: int) -> None:
    check_or_refuse(backend, phase, MIXED[phase], q_heads=q_heads, kv_heads=kv_heads, device=device)


@every_backend
@pytest.mark.parametrize("page_size", [1, 16, 24, 64, 256])
@pytest.mark.parametrize("ordered_pages", [False, True], ids=["shuffled", "ordered"])
@pytest.mark.parametrize("phase", PAGED)
def test_pages_of_any_size_and_order_equal_the_oracle(
    backend: Backend, device: str, page_size: int, ordered_pages: bool, phase: Phase
) -> None:
    for workload in WORKLOADS[phase].values():
        shape = workload.bind(phase, make_shape(page_size=page_size, device=device))
        if not backend.reasons_against(phase, shape):
            check(make_case(phase, workload, shape, ordered_pages=ordered_pages), backend)


@every_backend
@every_phase
def test_queries_may_be_a_slice_of_a_wider_tensor(backend: Backend, device: str, phase: Phase) -> None:
    """Models hand over parts of a fused projection: strided, not contiguous."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    case = make_case(phase, MIXED[phase], make_shape(device=device, dtype=dtype))
    wide = torch.full((len(case.q), 10, 32), torch.nan, device=device, dtype=dtype)
    wide[:, :6] = case.q
    sliced = replace(case, q=wide[:, :6])
    if phase is Phase.VISION:
        wide[:, 6:8], wide[:, 8:] = case.k, case.v
        sliced = replace(sliced, k=wide[:, 6:8], v=wide[:, 8:])
    check(sliced, backend)


@every_backend
def test_padding_sequences_give_finite_rows_and_disturb_no_other(backend: Backend, device: str) -> None:
    """A padded decode batch (kv_len 0, page table 0) attends to something finite: NaN would spread."""
    shape = make_shape(device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    alone = make_case(Phase.DECODE, Workload(((1, 20), (1, 70))), shape)
    padded = make_case(Phase.DECODE, Workload(((1, 20), (1, 70), (1, 0), (1, 0))), shape)
    padded.q[:2] = alone.q
    padded.batch.page_table.zero_()
    padded.batch.page_table[:2] = alone.batch.page_table
    check(replace(padded, k=alone.k, v=alone.v), backend)


@every_backend
@every_phase
def test_one_instance_serves_steps_of_changing_size(backend: Backend, device: str, phase: Phase) -> None:
    """Buffers and masks kept between steps must not leak one step's contents into the next."""
    shape = replace(MIXED[phase], window=None if phase is Phase.VISION else 50).bind(phase, make_shape(device=device))
    if reasons := backend.reasons_against(phase, shape):
        pytest.skip("; ".join(reasons))
    bound = backend(phase, shape)
    for name in [*WORKLOADS[phase], *reversed(WORKLOADS[phase])]:
        workload = replace(WORKLOADS[phase][name], window=shape.window, soft_cap=None, sinks=False, causal=shape.causal)
        case = make_case(phase, workload, shape)
        assert case.problems(case.answer_of(bound)) == []


@st.composite
def ragged_cases(draw: st.DrawFn) -> tuple[Phase, Workload, dict[str, Any]]:
    phase = draw(st.sampled_from(list(Phase)))
    q_lens = st.just(1) if phase is Phase.DECODE else st.integers(1, 300)
    older = st.just(0) if phase is Phase.VISION else st.integers(0, 300)
    lens = st.tuples(q_lens, older).map(lambda pair: (pair[0], pair[0] + pair[1]))
    window = None if phase is Phase.VISION else draw(st.none() | st.integers(1, 400))
    causal = phase is not Phase.PREFILL or draw(st.booleans())
    workload = Workload(tuple(draw(st.lists(lens, min_size=1, max_size=9))), window, causal=causal)
    kv_heads = draw(st.integers(1, 3))
    sizes = {
        "kv_heads": kv_heads,
        "q_heads": kv_heads * draw(st.integers(1, 5)),
        "head_dim": 8 * draw(st.integers(1, 8)),
        "page_size": draw(st.integers(1, 80)),
    }
    return phase, workload, sizes


@pytest.mark.parametrize("backend", [Naive, TorchSdpa, TorchSdpaMath], ids=lambda backend: backend.name)
@given(case=ragged_cases(), seed=st.integers(0, 1000), ordered_pages=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_random_ragged_batches_equal_the_oracle(
    backend: Backend, case: tuple[Phase, Workload, dict[str, Any]], seed: int, ordered_pages: bool
) -> None:
    phase, workload, sizes = case
    check(make_case(phase, workload, make_shape(**sizes), seed=seed, ordered_pages=ordered_pages), backend)
