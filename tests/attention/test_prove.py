"""What ran is held against the claim and against the name: liars of both kinds are caught on a CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attention_cases import DEVICES, make_shape
from liars import BolderFa3, BoldLiar, FalseFa3, Honest, Liar, Raising, Silent, Vague, Wrong, WrongWhereLong
from tessera.attention import prove, registry
from tessera.attention.backends.naive import Naive
from tessera.attention.backends.torch_sdpa import TorchSdpa, TorchSdpaMath
from tessera.attention.contract import AttentionBackend, Claim, Phase
from tessera.attention.prove import claim_problems, family_problems, profile_kernels, prove_alone
from tessera.attention.selftest import self_test
from tessera.attention.step import Bucket
from tessera.errors import BackendError
from tessera.types import KernelUse

SIZES = {Phase.PREFILL: Bucket(1, 33, 40), Phase.DECODE: Bucket(3, 1, 40), Phase.VISION: Bucket(1, 30, 30)}
FA2 = "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>(flash::Flash_fwd_params)"
FA2_SPLIT = "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4>>(flash::Flash_fwd_params)"
FA3 = "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90>>>"
FA4 = "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__tensor000o1641111"
TORCH_FLASH = "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128>>"
CUDNN = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x64_4x1x1"
EFFICIENT = "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>)"
FLASHINFER = "void flashinfer::BatchDecodeWithPagedKVCacheKernel<(flashinfer::PosEncodingMode)0>"
GEMM = "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT"


def uses(*names: str) -> list[KernelUse]:
    return [KernelUse(name, 1, 1.0) for name in names]


def bound(backend: type[AttentionBackend[Any]], phase: Phase, **features: Any) -> AttentionBackend[Any]:
    return backend(phase, registry.shape_in(phase, make_shape(**features)))


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("backend", [Naive, TorchSdpa, Honest], ids=lambda backend: backend.name)
def test_an_honest_backend_is_proven_by_the_kernels_of_its_claim(
    backend: type[AttentionBackend[Any]], phase: Phase
) -> None:
    symbols = prove_alone(bound(backend, phase), SIZES[phase])
    assert symbols and all(use.calls > 0 and use.microseconds > 0 for use in symbols)


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
def test_a_backend_that_calls_itself_flash_attn_and_calls_sdpa_fails(phase: Phase) -> None:
    with pytest.raises(BackendError) as caught:
        prove_alone(bound(Liar, phase), SIZES[phase])
    said = caught.value.message
    assert said.startswith(f"flash_attn is not what attends in {phase}: no kernel matches its claim 'FlashAttnFwdSm90'")
    assert "belongs to torch_sdpa:flash" in said and "claimed was 'FlashAttnFwdSm90', the longest that ran were" in said
    assert caught.value.hint and f"--{phase}-attention" in caught.value.hint


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("backend", [FalseFa3, BolderFa3], ids=lambda backend: backend.__name__)
def test_flash_attention_2_under_the_name_of_3_fails(backend: type[AttentionBackend[Any]], phase: Phase) -> None:
    liar = bound(backend, phase, device="cuda", dtype=torch.bfloat16, head_dim=64)
    with pytest.raises(BackendError, match=r"flash_attn:3 is not what attends.*pytorch_flash"):
        prove_alone(liar, SIZES[phase])


def test_a_claim_that_fits_what_ran_does_not_help_a_false_name() -> None:
    with pytest.raises(BackendError, match=r"belongs to torch_sdpa:flash; no kernel known to be of flash_attn ran"):
        prove_alone(bound(BoldLiar, Phase.PREFILL), SIZES[Phase.PREFILL])


@pytest.mark.parametrize(("backend", "said"), [(Silent, "it claims no kernel"), (Vague, "matches anything")])
def test_a_claim_that_says_nothing_fails(backend: type[AttentionBackend[Any]], said: str) -> None:
    with pytest.raises(BackendError, match=said):
        prove_alone(bound(backend, Phase.DECODE), SIZES[Phase.DECODE])


@pytest.mark.parametrize(
    ("backend", "symbol"),
    [
        ("flash_attn:2", FA2),
        ("flash_attn:2", FA2_SPLIT),
        ("flash_attn:3", FA3),
        ("flash_attn:4", FA4),
        ("flash_attn", FA2),
        ("torch_sdpa", TORCH_FLASH),
        ("torch_sdpa:flash", TORCH_FLASH),
        ("torch_sdpa:cudnn", CUDNN),
        ("torch_sdpa:efficient", EFFICIENT),
        ("xformers", EFFICIENT),
        ("flashinfer:fa2", FLASHINFER),
        ("triton", "paged_decode_kernel"),
        ("flex", "triton_tem_fused_flex_attention_0"),
        ("naive", GEMM),
        ("somebody_elses", FA3),
    ],
)
def test_a_kernel_is_its_own_librarys(backend: str, symbol: str) -> None:
    assert family_problems(backend, uses(symbol, GEMM)) == []


@pytest.mark.parametrize(
    ("backend", "symbol", "owner"),
    [
        ("flash_attn:3", FA2, "flash_attn:2"),
        ("flash_attn:3", TORCH_FLASH, "torch_sdpa:flash"),
        ("flash_attn:4", FA3, "flash_attn:3"),
        ("flash_attn:2", TORCH_FLASH, "torch_sdpa:flash"),
        ("torch_sdpa:cudnn", TORCH_FLASH, "torch_sdpa:flash"),
        ("xformers", FA2, "flash_attn:2"),
        ("xformers", TORCH_FLASH, "torch_sdpa:flash"),
        ("flashinfer:fa3", FA3, "flash_attn:3"),
        ("triton", "triton_tem_fused_flex_attention_0", "flex"),
        ("naive", TORCH_FLASH, "torch_sdpa:flash"),
    ],
)
def test_another_librarys_kernel_is_a_problem(backend: str, symbol: str, owner: str) -> None:
    (problem,) = family_problems(backend, uses(GEMM, symbol))
    assert problem.endswith(f"ran, which belongs to {owner}")


def test_every_must_is_wanted_and_no_must_not() -> None:
    claim = Claim(must=("bmm", "softmax"), must_not=("flash",))
    assert claim_problems(claim, uses("aten::bmm", "aten::_softmax")) == []
    assert claim_problems(claim, uses("aten::bmm", "flash_fwd")) == [
        "no kernel matches its claim 'softmax'",
        "flash_fwd ran, which it claims not to launch",
    ]


def test_profile_counts_calls_and_marked_ranges() -> None:
    def work() -> None:
        with torch.profiler.record_function("mine::range"):
            for _ in range(3):
                torch.ones(8, 8) @ torch.ones(8, 8)

    seen = {use.name: use for use in profile_kernels(work, "cpu")}
    assert (seen["aten::mm"].calls, seen["mine::range"].calls) == (3, 1)
    assert seen["mine::range"].microseconds >= 0


def test_a_claimed_operator_has_the_time_of_what_it_calls_and_no_time_is_counted_twice() -> None:
    def work() -> None:
        with torch.profiler.record_function("mine::range"):
            torch.ones(300, 300) @ torch.ones(300, 300)
        torch.ones(300, 300).exp()

    seen = {use.name: use for use in profile_kernels(work, "cpu", ["^mine::", "aten::matmul"])}
    assert seen["aten::mm"].microseconds == 0 < seen["aten::mm"].calls  # it is part of aten::matmul
    assert seen["aten::matmul"].microseconds > 0  # the nearest claimed one; the range has the rest
    assert seen["mine::range"].microseconds > 0 < seen["aten::exp"].microseconds
    whole = {use.name: use for use in profile_kernels(lambda: range_around(work), "cpu", ["^all$"])}
    assert sum(use.microseconds for use in whole.values()) == whole["all"].microseconds


def range_around(work: Callable[[], None]) -> None:
    with torch.profiler.record_function("all"):
        work()


@pytest.mark.parametrize("phase", list(Phase))
def test_the_unfused_path_is_proven_with_the_time_of_its_products(
    phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its operator does nothing but call others: alone it would have next to no time."""
    seen: list[KernelUse] = []

    def noted(*arguments: Any) -> list[KernelUse]:
        seen.extend(profile_kernels(*arguments))
        return seen

    monkeypatch.setattr(prove, "profile_kernels", noted)
    (own,) = prove_alone(bound(TorchSdpaMath, phase), SIZES[phase])
    assert own.microseconds > 0
    assert {use.microseconds for use in seen if use.name == "aten::bmm"} == {0}  # all of it is part of the operator


@pytest.mark.parametrize("device", DEVICES)
def test_profiling_says_nothing_of_its_own(device: str) -> None:
    """In a process of its own, since torch says some things once, and reads once how much it is to say."""
    code = f"""
import torch
from tessera.attention.prove import profile_kernels
x = torch.ones(8, 8, device={device!r})
for _ in range(2):
    profile_kernels(lambda: x @ x, {device!r})
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
@pytest.mark.parametrize("features", [{}, {"window": 20}, {"soft_cap": 3.0}, {"sinks": True}], ids=str)
def test_self_test_passes_the_right_and_stops_the_wrong(phase: Phase, features: dict[str, Any]) -> None:
    self_test([bound(Naive, phase, **features)])
    with pytest.raises(BackendError, match=rf"wrong fails its self-test for {phase}.*: error \d.*lengths") as caught:
        self_test([bound(Wrong, phase, **features)])
    assert caught.value.hint and "tessera verify wrong" in caught.value.hint


def test_self_test_stops_who_is_wrong_where_a_graph_is_planned_for_long_sequences() -> None:
    """What serves long sequences may be planned otherwise than what serves short ones."""
    with pytest.raises(BackendError, match="wrong fails its self-test for decode"):
        self_test([bound(WrongWhereLong, Phase.DECODE)])
    self_test([bound(WrongWhereLong, Phase.PREFILL)])  # which short sequences alone are asked of


def test_a_profiler_that_sees_nothing_is_an_error_of_its_own() -> None:
    with pytest.raises(BackendError, match="the profiler saw nothing run") as caught:
        profile_kernels(lambda: None, "cpu")
    assert caught.value.hint and "--no-prove-attention" in caught.value.hint


def test_self_test_tells_what_a_library_raises() -> None:
    with pytest.raises(BackendError, match="ValueError: no such tile"):
        self_test([bound(Raising, Phase.DECODE)])


def test_a_kernel_that_waits_on_the_device_for_the_one_before_it_is_not_billed_for_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As dependent launches do: each is there before the one before it has ended."""
    spans = {"first": (0.0, 10.0), "second": (1.0, 13.0), "third": (11.0, 14.0), "fourth": (20.0, 25.0)}
    events = [SimpleNamespace(name=name, time_range=SimpleNamespace(start=a, end=b)) for name, (a, b) in spans.items()]
    monkeypatch.setattr(prove, "_cuda_events", lambda _: events)
    found = {use.name: use.microseconds for use in profile_kernels(lambda: None, "cuda")}
    assert found == {"first": 10.0, "fourth": 5.0, "second": 3.0, "third": 1.0}
