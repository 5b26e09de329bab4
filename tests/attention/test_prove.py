"""What ran is held against the claim and against the name: liars of both kinds are caught on a CPU."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attention_cases import make_shape
from tessera import LLM
from tessera.attention import registry
from tessera.attention.backends.naive import Naive
from tessera.attention.backends.torch_sdpa import TorchSdpa, TorchSdpaFlash
from tessera.attention.contract import AttentionBackend, Claim, Phase, Shape
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


class Liar(Naive):
    """Calls itself after FlashAttention, claims what its kernels would be called, and calls SDPA."""

    name: ClassVar[str] = "flash_attn"

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        return Claim(must=("FlashAttnFwdSm90",))

    def _attend(self, part: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Any) -> torch.Tensor:
        scaled_dot_product_attention(q[None], q[None], q[None])
        return super()._attend(part, q, k, v, sinks)


class BoldLiar(Liar):
    """Claims what it runs, under a name that must not run it."""

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        return Claim(must=("scaled_dot_product",))


class Silent(Naive):
    """Claims nothing."""

    name: ClassVar[str] = "silent"

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        return Claim(must=())


class Vague(Silent):
    """Claims whatever there is."""

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        return Claim(must=(".*",))


class Honest(Silent):
    """A name of its own, and a claim that is true."""

    name: ClassVar[str] = "honest"

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        return Claim(must=("aten::bmm",), must_not=("scaled_dot_product",))


class Wrong(Honest):
    """Scales by the wrong number, which no look at the result's size would tell."""

    name: ClassVar[str] = "wrong"

    def _attend(self, part: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Any) -> torch.Tensor:
        return super()._attend(part, q * 0.9, k, v, sinks)


class Raising(Honest):
    def plan(self, batch: Any) -> Any:
        raise ValueError(f"no such tile for {len(batch.q_lens_cpu)}")


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


class FalseFa3(TorchSdpaFlash):
    """Claims FlashAttention 3 and runs torch's build of FlashAttention 2."""

    name: ClassVar[str] = "flash_attn:3"

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        return Claim(must=("FlashAttnFwdSm90",))


class BolderFa3(FalseFa3):
    """Claims just what it runs."""

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        return Claim(must=("flash_fwd",))


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


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
@pytest.mark.parametrize("features", [{}, {"window": 20}, {"soft_cap": 3.0}, {"sinks": True}], ids=str)
def test_self_test_passes_the_right_and_stops_the_wrong(phase: Phase, features: dict[str, Any]) -> None:
    self_test([bound(Naive, phase, **features)])
    with pytest.raises(BackendError, match=rf"wrong fails its self-test for {phase}.*: error \d.*lengths") as caught:
        self_test([bound(Wrong, phase, **features)])
    assert caught.value.hint and "tessera verify wrong" in caught.value.hint


def test_a_profiler_that_sees_nothing_is_an_error_of_its_own() -> None:
    with pytest.raises(BackendError, match="the profiler saw nothing run") as caught:
        profile_kernels(lambda: None, "cpu")
    assert caught.value.hint and "--no-prove-attention" in caught.value.hint


def test_self_test_tells_what_a_library_raises() -> None:
    with pytest.raises(BackendError, match="ValueError: no such tile"):
        self_test([bound(Raising, Phase.DECODE)])


@pytest.fixture(autouse=True)
def plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package beside tessera with a liar, a wrong one and an honest one."""
    module = ModuleType("liars")
    for backend in (Liar, Wrong, Honest):
        setattr(module, backend.__name__, backend)
    monkeypatch.setitem(sys.modules, "liars", module)
    paths = {"flash_attn": "liars:Liar", "wrong": "liars:Wrong", "honest": "liars:Honest"}
    points = EntryPoints(EntryPoint(name, path, "tessera.attention") for name, path in paths.items())
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points.select(group=group))


def load(**settings: Any) -> LLM:
    return LLM(dtype="float32", device="cpu", max_model_len=128, num_pages=16, **settings)


def test_a_liar_named_by_a_user_does_not_get_to_serve() -> None:
    with pytest.raises(BackendError, match="flash_attn is not what attends in decode"):
        load(decode_attention="flash_attn", prove_attention=True)


def test_a_wrong_backend_is_stopped_before_the_weights_are_read() -> None:
    with pytest.raises(BackendError, match="wrong fails its self-test for prefill"):
        load(attention="wrong")


@pytest.mark.parametrize("name", ["honest", "naive", "torch_sdpa"])
def test_the_engine_holds_a_proof_of_each_phase_in_the_model(name: str) -> None:
    info = load(attention=name, prove_attention=True).info
    assert [choice.phase for choice in info.attention] == ["prefill", "decode"]
    for choice in info.attention:
        (proof,) = choice.proofs
        assert (proof.backend, proof.variant, proof.phase) == (name, None, choice.phase)
        assert sum(use.calls for use in proof.symbols) >= 30  # the model's layers
        assert proof.time_share is not None and 0 < proof.time_share < 1
        assert proof.versions["torch"] == torch.__version__ and proof.device == info.device


def test_proof_is_off_unless_it_is_asked_for() -> None:
    assert all(choice.proofs == [] for choice in load(attention="torch_sdpa").info.attention)
