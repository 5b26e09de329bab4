"""Variants of torch_sdpa: each runs the kernel it is named for, or is refused with torch's own reasons."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from attention_cases import make_shape
from tessera.attention.backends import sdpa_probe, torch_sdpa
from tessera.attention.backends.naive import Naive
from tessera.attention.backends.sdpa_probe import reasons_in
from tessera.attention.backends.torch_sdpa import (
    TorchSdpa,
    TorchSdpaCudnn,
    TorchSdpaEfficient,
    TorchSdpaFlash,
    TorchSdpaMath,
)
from tessera.attention.contract import AttentionBackend, Claim, Limits, Phase
from tessera.attention.workloads import WORKLOADS, Workload, make_case

ON_CPU: list[type[AttentionBackend[Any]]] = [Naive, TorchSdpa, TorchSdpaFlash, TorchSdpaMath]
LENS = {
    Phase.DECODE: Workload(((1, 9), (1, 200), (1, 64))),
    Phase.PREFILL: Workload(((33, 33), (5, 300))),
    Phase.VISION: Workload(((33, 33), (64, 64), (64, 64))),
}


class Unmasked(TorchSdpa):
    """Plans as flash attention does on CUDA, where it takes no mask."""

    @classmethod
    def takes_masks(cls, device_type: str) -> bool:
        return False


class Mislabelled(TorchSdpaFlash):
    """Calls itself flash and runs the math path."""

    only: ClassVar[SDPBackend | None] = SDPBackend.MATH

    @classmethod
    def claim(cls, phase: Phase, shape: Any) -> Claim:
        return TorchSdpaFlash.claim(phase, shape)


@pytest.fixture(autouse=True)
def forget_trials() -> Iterator[None]:
    sdpa_probe._tried.cache_clear()
    yield
    sdpa_probe._tried.cache_clear()


def breaches(backend: type[AttentionBackend[Any]], phase: Phase, window: int | None = None, **sizes: Any) -> list[str]:
    """The patterns of a backend's claim that one profiled layer does not bear out."""
    case = make_case(phase, replace(LENS[phase], window=window), make_shape(**sizes))
    bound = backend(phase, case.shape)
    plan = bound.plan(case.batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        bound.run(plan, case.q, case.k, case.v)
    names = [event.key for event in profiler.key_averages()]
    claim = backend.claim(phase, case.shape)
    assert claim.must
    seen = {pattern: any(re.search(pattern, name) for name in names) for pattern in claim.must + claim.must_not}
    return [pattern for pattern in claim.must if not seen[pattern]] + [p for p in claim.must_not if seen[p]]


@pytest.mark.parametrize("backend", ON_CPU, ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_profiler_sees_on_a_cpu_what_each_claims_and_nothing_it_denies(
    backend: type[AttentionBackend[Any]], dtype: torch.dtype
) -> None:
    for phase in Phase:
        for window in (None,) if phase is Phase.VISION else (None, 20):
            assert breaches(backend, phase, window, dtype=dtype) == []


def test_math_path_under_the_label_of_flash_breaks_the_claim() -> None:
    for phase in Phase:
        flash, math = TorchSdpaFlash.claim(phase, make_shape()).must, TorchSdpaMath.claim(phase, make_shape()).must
        assert breaches(Mislabelled, phase) == [*flash, *math]


@pytest.mark.parametrize("phase", list(Phase))
def test_kernel_that_torch_would_replace_is_refused_in_torchs_own_words(
    phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given keys whose last stride is not 1, torch takes the math path; asked for flash alone it says why not."""

    def strided(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, mask, **options)

    monkeypatch.setattr(torch_sdpa, "scaled_dot_product_attention", strided)
    shape = replace(
        make_shape(head_dim=40), page_size=None if phase is Phase.VISION else 16
    )  # a size no other test asks
    shape = replace(shape, causal=phase is not Phase.VISION)
    (reason,) = TorchSdpaFlash.reasons_against(phase, shape)
    assert reason.startswith("torch: All fused kernels require the last dimension of the input to have stride 1")
    assert "Triggered internally" not in reason
    assert TorchSdpaMath.reasons_against(phase, shape) == []
    assert TorchSdpa.reasons_against(phase, shape) == []  # it leaves the kernel to torch


def test_dtype_that_torch_would_not_give_to_flash_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits((torch.float8_e4m3fn,), devices=("cpu",))
    monkeypatch.setattr(TorchSdpaFlash, "limits", dict.fromkeys(Phase, limits))
    reasons = TorchSdpaFlash.reasons_against(Phase.DECODE, make_shape(dtype=torch.float8_e4m3fn))
    assert reasons
    assert all(reason.startswith("torch") for reason in reasons)


def test_only_the_named_kernels_reasons_are_told_and_each_once() -> None:
    messages = [
        "Memory efficient kernel not used because: (Triggered internally at sdp_utils.cpp:832.)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at a.h:550.)",
        "Flash attention kernel not used because: (Triggered internally at sdp_utils.cpp:834.)",
        "Expected query, key and value to all be of dtype: {Half, BFloat16}. (Triggered internally at a.h:91.)",
        "TRITON_DEFAULT_FP_FUSION is unset: another thread's warning",
        "Flash Attention does not support non-null attn_mask. (Triggered internally at a.h:281.)",
        "Flash Attention does not support non-null attn_mask. (Triggered internally at a.h:281.)",
        "cuDNN attention kernel not used because: (Triggered internally at sdp_utils.cpp:836.)",
        "cuDNN attention has been runtime disabled. (Triggered internally at sdp_utils.cpp:556.)",
    ]
    assert reasons_in(messages, SDPBackend.FLASH_ATTENTION) == (
        "torch: Expected query, key and value to all be of dtype: {Half, BFloat16}",
        "torch: Flash Attention does not support non-null attn_mask",
    )
    assert reasons_in(messages, SDPBackend.CUDNN_ATTENTION) == ("torch: cuDNN attention has been runtime disabled",)


@pytest.mark.parametrize("backend", [TorchSdpaCudnn, TorchSdpaEfficient], ids=lambda backend: backend.name)
def test_kernels_of_cuda_are_refused_on_a_cpu_without_a_trial(backend: type[TorchSdpa]) -> None:
    shape = make_shape(dtype=torch.bfloat16)
    assert backend.reasons_against(Phase.DECODE, shape) == ["device cpu not in ('cuda',)"]


@pytest.mark.parametrize(("phase", "name"), [(phase, name) for phase in Phase for name in WORKLOADS[phase]])
def test_plan_without_masks_equals_the_oracle(phase: Phase, name: str) -> None:
    case = make_case(phase, WORKLOADS[phase][name], make_shape())
    reasons = Unmasked.reasons_against(phase, case.shape)
    assert bool(reasons) == ("soft_cap" in name or "sinks" in name)
    if not reasons:
        assert case.problems(case.answer(Unmasked)) == []


@pytest.mark.parametrize("backend", [*ON_CPU, Unmasked], ids=lambda backend: backend.__name__)
@pytest.mark.parametrize("window", [None, 4])
def test_a_decode_of_padding_rows_alone_is_finite(backend: type[AttentionBackend[Any]], window: int | None) -> None:
    for num_rows in (1, 3):
        case = make_case(Phase.DECODE, Workload(((1, 0),) * num_rows, window), make_shape())
        assert case.batch.page_table.tolist() == [[0]] * num_rows
        assert case.problems(case.answer(backend)) == []


def test_decode_without_masks_has_none_and_one_call_for_sequences_of_one_length() -> None:
    case = make_case(Phase.DECODE, Workload(((1, 70), (1, 33), (1, 70), (1, 70)), window=20), make_shape(kv_heads=2))
    plan: Any = Unmasked(Phase.DECODE, case.shape).plan(case.batch)
    assert [group.mask for group in plan.groups] == [None, None]
    assert sorted(plan.sizes) == [1, 3]
    assert case.problems(case.answer(Unmasked)) == []


def test_variant_leaves_torchs_own_choice_as_it_was() -> None:
    make_case(Phase.DECODE, LENS[Phase.DECODE], make_shape()).answer(TorchSdpaMath)
    assert breaches(TorchSdpa, Phase.DECODE) == []
