"""flash_attn and flashinfer: what holds of all their backends, and on a GPU, against the libraries themselves."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from cuda_library_cases import BACKENDS, HOPPER, PHASES, Backend, every_claim, every_phase, of_phases, shape_for
from tessera.attention.backends.flash_attn import FlashAttn2, FlashAttn3, FlashAttn4
from tessera.attention.backends.flashinfer import (
    FlashInferCudaCores,
    FlashInferFa2,
    FlashInferFa3,
    FlashInferTensorCores,
)
from tessera.attention.checks import MIXED, Subject
from tessera.attention.checks_cuda import graph_replay
from tessera.attention.contract import Phase
from tessera.attention.workloads import WORKLOADS, Case


@every_phase
def test_on_a_cpu_it_is_refused_for_the_device_at_least(backend: Backend, phase: Phase) -> None:
    reasons = backend.reasons_against(phase, replace(shape_for(backend), causal=phase is not Phase.VISION))
    assert "device cpu not in ('cuda',)" in reasons
    assert not any("compute capability" in reason or "nvcc" in reason for reason in reasons)


@every_phase
def test_where_the_library_is_missing_that_is_said_first(
    backend: Backend, phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.attention.contract.is_installed", lambda module: module not in backend.needs)
    reasons = backend.reasons_against(phase, HOPPER)
    assert reasons[: len(backend.needs)] == [f"{module} is not installed" for module in backend.needs]
    assert backend.install
    assert backend.install.startswith("pip install")


KERNELS = {
    (FlashAttn4, Phase.DECODE): "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at",
    (FlashAttn3, Phase.DECODE): "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<>>>",
    (FlashAttn2, Phase.DECODE): "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64, 64>>",
    (FlashAttn2, Phase.PREFILL): "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 64>>",
    (FlashInferFa2, Phase.PREFILL): "void flashinfer::BatchPrefillWithPagedKVCacheKernel<flashinfer::KernelTraits<>>",
    (FlashInferFa2, Phase.VISION): "void flashinfer::BatchPrefillWithRaggedKVCacheKernel<flashinfer::KernelTraits<>>",
    (FlashInferFa3, Phase.PREFILL): "void flashinfer::PrefillWithKVCacheKernel<flashinfer::CollectiveMainloop<>>",
    (FlashInferCudaCores, Phase.DECODE): "void flashinfer::BatchDecodeWithPagedKVCacheKernel<(PosEncodingMode)0, 2>",
    (None, Phase.PREFILL): "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 64>>",
    (None, Phase.VISION): "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7",
}
"""Symbols as the sources and profiles spell them."""


@every_phase
def test_a_claim_fits_its_own_kernel_and_no_other(backend: Backend, phase: Phase) -> None:
    claim = backend.claim(phase, HOPPER)

    def fits(symbol: str) -> bool:
        return all(re.search(p, symbol) for p in claim.must) and not any(re.search(p, symbol) for p in claim.must_not)

    owners = {owner for (owner, _), symbol in KERNELS.items() if fits(symbol)}
    assert owners == ({FlashInferFa2} if backend is FlashInferTensorCores else {backend})


def on_the_gpu(backend: Backend, phase: Phase, **sizes: Any) -> Subject:
    """The backend with these sizes on this machine's GPU; skips with every reason where it cannot serve them."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    subject = Subject(backend, phase, shape_for(backend, **{"q_heads": 8, "head_dim": 128, "device": "cuda", **sizes}))
    if reasons := backend.reasons_against(phase, MIXED[phase].bind(phase, subject.base)):
        pytest.skip("; ".join(reasons))
    return subject


def problems_of(subject: Subject, case: Case) -> list[str]:
    return case.problems(case.answer(subject.backend))


@every_claim(*BACKENDS)
def test_workload_equals_the_oracle_on_a_gpu(backend: Backend, phase: Phase, name: str) -> None:
    subject = on_the_gpu(backend, phase)
    assert problems_of(subject, subject.case(WORKLOADS[phase][name])) == []


@every_phase
def test_float16_equals_the_oracle_on_a_gpu(backend: Backend, phase: Phase) -> None:
    subject = on_the_gpu(backend, phase, dtype=torch.float16)
    assert problems_of(subject, subject.case(MIXED[phase])) == []


@every_phase
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 256])
def test_head_dim_equals_the_oracle_on_a_gpu(backend: Backend, phase: Phase, head_dim: int) -> None:
    subject = on_the_gpu(backend, phase, head_dim=head_dim)
    assert problems_of(subject, subject.case(MIXED[phase])) == []


@every_phase
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(9, 3), (4, 4), (7, 1), (10, 2), (32, 4)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_group_equals_the_oracle_on_a_gpu(
    backend: Backend, phase: Phase, head_dim: int, q_heads: int, kv_heads: int
) -> None:
    subject = on_the_gpu(backend, phase, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
    assert problems_of(subject, subject.case(MIXED[phase])) == []


@of_phases((backend, phase) for backend, phase in PHASES if phase is not Phase.VISION)
@pytest.mark.parametrize("page_size", [1, 64, 128, 256])
def test_page_size_equals_the_oracle_on_a_gpu(backend: Backend, phase: Phase, page_size: int) -> None:
    subject = on_the_gpu(backend, phase, page_size=page_size)
    assert problems_of(subject, subject.case(MIXED[phase])) == []


@of_phases((backend, phase) for backend, phase in PHASES if backend.limits[phase].graphs)
@pytest.mark.parametrize("window", [None, 50])
def test_graph_replay_equals_the_oracle_on_a_gpu(backend: Backend, phase: Phase, window: int | None) -> None:
    assert backend.limits[phase].windows  # of all that claim graphs
    assert graph_replay(on_the_gpu(backend, phase), window) == []
