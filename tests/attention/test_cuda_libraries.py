"""flash_attn and flashinfer: without a GPU against stand-ins that do what the libraries' documentation says, with one
against the libraries themselves."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import make_shape
from tessera.attention.backends import flashinfer
from tessera.attention.backends.flash_attn import FlashAttn2, FlashAttn3, FlashAttn4
from tessera.attention.backends.flashinfer import (
    FlashInferCudaCores,
    FlashInferFa2,
    FlashInferFa3,
    FlashInferTensorCores,
    PlannedWrapper,
)
from tessera.attention.backends.page_lists import list_pages
from tessera.attention.checks import MIXED, Subject
from tessera.attention.checks_cuda import graph_replay
from tessera.attention.contract import AttentionBackend, Phase, Shape
from tessera.attention.workloads import WORKLOADS, Case, make_batch, make_case

Backend = type[AttentionBackend[Any]]

BACKENDS: tuple[Backend, ...] = (
    FlashAttn4,
    FlashAttn3,
    FlashAttn2,
    FlashInferFa2,
    FlashInferFa3,
    FlashInferTensorCores,
    FlashInferCudaCores,
)
PHASES = [(backend, phase) for backend in BACKENDS for phase in backend.limits]
HOPPER = Shape(9, 3, 64, 0.125, torch.bfloat16, "cuda", (9, 0), 256)


def shape_for(backend: Backend, **sizes: Any) -> Shape:
    page_size = 256 if backend is FlashAttn2 else 16
    return make_shape(**{"dtype": torch.bfloat16, "head_dim": 64, "page_size": page_size, **sizes})


def claimed(backend: Backend, phase: Phase) -> Iterable[str]:
    """The workloads that the limits allow on Hopper."""
    for name, workload in WORKLOADS[phase].items():
        shape = workload.bind(phase, replace(shape_for(backend), device_type="cuda", capability=(9, 0)))
        if not backend.limits[phase].problems(shape):
            yield name


every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
every_phase = pytest.mark.parametrize(("backend", "phase"), PHASES, ids=lambda part: getattr(part, "name", part))
every_claim = pytest.mark.parametrize(
    ("backend", "phase", "name"),
    [(backend, phase, name) for backend, phase in PHASES for name in claimed(backend, phase)],
    ids=lambda part: getattr(part, "name", part),
)


# Reasons, limits and claims.


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


@pytest.mark.parametrize(
    ("backend", "phase", "change", "reason"),
    [
        (FlashAttn4, Phase.PREFILL, {"capability": (8, 6)}, "needs compute capability 9.0, has 8.6"),
        (FlashAttn4, Phase.PREFILL, {"capability": (12, 0)}, "made for compute capability up to 11.9, has 12.0"),
        (FlashAttn4, Phase.PREFILL, {"capability": (10, 0), "head_dim": 192}, "head_dim 192 on Blackwell"),
        (FlashAttn4, Phase.DECODE, {"head_dim": 72}, "head_dim 72 not in (64, 128)"),
        (FlashAttn3, Phase.PREFILL, {"dtype": torch.float16}, "dtype torch.float16 not in (torch.bfloat16,)"),
        (FlashAttn3, Phase.DECODE, {"window": 16}, "no sliding window, the model has one of 16"),
        (FlashAttn3, Phase.VISION, {"capability": (10, 0)}, "made for compute capability up to 9.9, has 10.0"),
        (FlashAttn2, Phase.DECODE, {"page_size": 16}, "page_size 16 not in range(256, 4097, 256)"),
        (FlashAttn2, Phase.DECODE, {"sinks": True}, "no attention sinks, the model has them"),
        (FlashInferFa2, Phase.DECODE, {}, "no decode kernel"),
        (FlashInferFa2, Phase.PREFILL, {"head_dim": 80}, "head_dim 80 not in (64, 128, 256)"),
        (FlashInferFa2, Phase.PREFILL, {"window": 9, "causal": False}, "a window reaches back only"),
        (FlashInferFa3, Phase.PREFILL, {"capability": (10, 0)}, "made for compute capability up to 9.0, has 10.0"),
        (FlashInferTensorCores, Phase.DECODE, {"sinks": True}, "no attention sinks, the model has them"),
        (FlashInferCudaCores, Phase.DECODE, {"num_q_heads": 15}, "query heads a key-value head 5 not in"),
    ],
    ids=lambda part: getattr(part, "name", str(part)),
)
def test_what_it_cannot_serve_it_refuses(backend: Backend, phase: Phase, change: dict[str, Any], reason: str) -> None:
    reasons = backend.reasons_against(phase, replace(HOPPER, **change))
    assert any(found.startswith(reason) for found in reasons), reasons


def test_flashinfer_without_a_compiler_is_refused_unless_its_kernels_are_ready_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flashinfer, "has_nvcc", lambda: False)
    monkeypatch.setattr(flashinfer, "is_installed", lambda _: False)
    assert any("neither nvcc" in reason for reason in FlashInferFa2.reasons_against(Phase.PREFILL, HOPPER))
    monkeypatch.setattr(flashinfer, "is_installed", lambda _: True)
    assert not any("neither nvcc" in reason for reason in FlashInferFa2.reasons_against(Phase.PREFILL, HOPPER))


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


# Page lists.


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
def test_page_lists_name_the_pages_of_each_sequence_in_order(phase: Phase, page_size: int) -> None:
    for workload in WORKLOADS[phase].values():
        batch = make_case(phase, workload, make_shape(page_size=page_size)).batch
        lists = list_pages(batch, page_size)
        starts = lists.starts.tolist()
        assert starts == lists.starts_cpu.tolist()
        for row, kv_len in enumerate(batch.kv_lens_cpu):
            held = -(-max(1, kv_len) // page_size)
            assert lists.pages[starts[row] : starts[row + 1]].tolist() == batch.page_table[row, :held].tolist()
            assert (held - 1) * page_size + int(lists.last_page_lens_cpu[row]) == max(1, kv_len)
        assert starts[-1] == len(lists.pages)
        assert {lists.pages.dtype, lists.starts.dtype, lists.last_page_lens_cpu.dtype} == {torch.int32}


def test_a_padding_row_counts_as_one_token_of_its_first_page() -> None:
    table = torch.tensor([[7, 3, 9, 0], [0, 0, 0, 0], [4, 8, 0, 0]], dtype=torch.int32)[:, :3]
    lists = list_pages(make_batch(((1, 35), (1, 0), (1, 32)), table), 16)
    assert lists.starts.tolist() == [0, 3, 4, 6]
    assert lists.pages.tolist() == [7, 3, 9, 0, 4, 8]
    assert lists.last_page_lens_cpu.tolist() == [3, 1, 16]


# The libraries' calls, against stand-ins.


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    cap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """One sequence, masks aligned to the lower right corner, windows inclusive; no keys give zeros."""
    group, left, right = q.shape[1] // k.shape[1], *window
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    ahead = torch.arange(len(k)) - torch.arange(len(k) - len(q), len(k))[:, None]
    hidden = (ahead > 0) & causal
    hidden |= ahead > (right if right is not None and right >= 0 else len(k))
    hidden |= -ahead > (left if left is not None and left >= 0 else len(k))
    extra = q.new_full((q.shape[1],), -torch.inf) if sink is None else sink
    column = extra.double()[:, None, None].expand(-1, len(q), 1)
    weights = torch.cat((scores.masked_fill(hidden, -torch.inf), column), -1).softmax(-1)[..., :-1].nan_to_num()
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def unpaged(pool: Tensor, pages: Tensor, length: int) -> Tensor:
    return pool[pages.long()].flatten(0, 1)[:length]


def flash_attn_4(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, window_size: tuple[int | None, int | None],
    softcap: float, learnable_sink: Tensor | None, causal: bool = False, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, seqused_k: Tensor | None = None, page_table: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """As flash_attn/cute/interface.py says of flash_attn_varlen_func."""
    assert max_seqlen_k is not None
    options: Any = {"scale": softmax_scale, "causal": causal, "window": window_size, "cap": softcap,
                    "sink": learnable_sink}  # fmt: skip
    queries = list(q) if cu_seqlens_q is None else list(torch.split(q, cu_seqlens_q.diff().tolist()))
    assert cu_seqlens_q is None or max_seqlen_q == max(map(len, queries))
    outs = []
    for row, own in enumerate(queries):
        if page_table is None:
            assert cu_seqlens_k is not None
            keys = [x[cu_seqlens_k[row] : cu_seqlens_k[row + 1]] for x in (k, v)]
        else:
            assert cu_seqlens_k is None
            assert seqused_k is not None
            keys = [unpaged(x, page_table[row], int(seqused_k[row])) for x in (k, v)]
        outs.append(attend(own, *keys, **options))
    return (torch.stack(outs) if cu_seqlens_q is None else torch.cat(outs)), None


def flash_attn_3(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_k: Tensor | None = None, *, softmax_scale: float, causal: bool, softcap: float, num_splits: int,
) -> Tensor:  # fmt: skip
    """As fa3_fwd_interface.py says of flash_attn_varlen_func."""
    assert num_splits in (0, 1)
    lens = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(lens.max()))
    outs = []
    for row, own in enumerate(torch.split(q, cu_seqlens_q.diff().tolist())):
        keys = slice(int(cu_seqlens_k[row]), int(cu_seqlens_k[row]) + int(lens[row]))
        outs.append(attend(own, k[keys], v[keys], scale=softmax_scale, causal=causal, cap=softcap))
    return torch.cat(outs)


def flash_attn_2(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float, block_table: Tensor | None,
) -> Tensor:  # fmt: skip
    """As flash_attn_interface.py says of flash_attn_varlen_func."""
    assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
    options: Any = {"scale": softmax_scale, "causal": causal, "window": window_size, "cap": softcap}
    outs = []
    for row, own in enumerate(torch.split(q, cu_seqlens_q.diff().tolist())):
        start, end = cu_seqlens_k[row : row + 2].tolist()
        keys = [x[start:end] if block_table is None else unpaged(x, block_table[row], end - start) for x in (k, v)]
        outs.append(attend(own, *keys, **options))
    return torch.cat(outs)


def flash_attn_2_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor, softmax_scale: float,
    causal: bool, window_size: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    """As flash_attn_interface.py says."""
    options: Any = {"scale": softmax_scale, "causal": causal, "window": window_size, "cap": softcap}
    lens = cache_seqlens.tolist()
    keys = [[unpaged(x, block_table[row], n) for x in (k_cache, v_cache)] for row, n in enumerate(lens)]
    return torch.stack([attend(own, *pair, **options) for own, pair in zip(q, keys)])


class FlashInferWrapper:
    """What the three wrappers' documentation says; `lists` are where each sequence's queries and pages begin."""

    ragged = decode = False

    def __init__(self, workspace: Tensor, kv_layout: str, *, backend: str, **options: Any) -> None:
        assert workspace.dtype == torch.uint8
        assert kv_layout == "NHD"
        self.backend, self.captured, self.planned = backend, options, 0
        assert options.pop("use_tensor_cores", True) == (backend != "auto")

    def plan(self, *arguments: Any, **options: Any) -> None:
        lists = list(arguments[: 3 if self.decode else 2 if self.ragged else 4])
        self.heads = arguments[len(lists) : len(lists) + 3]
        assert all(x.device.type == "cpu" and x.dtype == torch.int32 for x in lists)
        if self.decode:
            lists = [torch.arange(len(lists[0]), dtype=torch.int32), *lists]
            if self.captured:
                assert len(lists[3]) == len(self.captured["paged_kv_last_page_len_buffer"])
                assert len(lists[2]) <= len(self.captured["paged_kv_indices_buffer"])
        self.lists, self.page_size = lists, 0 if self.ragged else arguments[-1]
        self.causal = options.pop("causal", False)
        assert options.pop("q_data_type") == options.pop("kv_data_type") == torch.bfloat16
        self.options: Any = {"scale": options.pop("sm_scale"), "window": (options.pop("window_left"), None)}
        self.options |= {"cap": options.pop("logits_soft_cap"), "causal": self.causal}
        self.planned += 1
        assert not options

    def run(self, q: Tensor, *keys: Any) -> Tensor:
        k, v = keys if self.ragged else keys[0]
        assert self.heads == (q.shape[1], k.shape[-2], q.shape[2])
        outs = []
        for row, own in enumerate(torch.split(q, self.lists[0].diff().tolist())):
            start, end = self.lists[1][row : row + 2].tolist()
            if self.ragged:
                pair = [x[start:end] for x in (k, v)]
            else:
                length = (end - start - 1) * self.page_size + int(self.lists[3][row])
                pair = [unpaged(x, self.lists[2][start:end], length) for x in (k, v)]
            outs.append(attend(own, *pair, **self.options))
        return torch.cat(outs)


class FlashInferRagged(FlashInferWrapper):
    ragged = True


class FlashInferDecode(FlashInferWrapper):
    decode = True


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the libraries' names."""
    modules: dict[str, dict[str, Callable[..., Any]]] = {
        "flash_attn.cute": {"flash_attn_varlen_func": flash_attn_4},
        "fa3_fwd_interface": {"flash_attn_varlen_func": flash_attn_3},
        "flash_attn.flash_attn_interface": {
            "flash_attn_varlen_func": flash_attn_2,
            "flash_attn_with_kvcache": flash_attn_2_with_kvcache,
        },
        "flashinfer": {
            "BatchPrefillWithPagedKVCacheWrapper": FlashInferWrapper,
            "BatchPrefillWithRaggedKVCacheWrapper": FlashInferRagged,
            "BatchDecodeWithPagedKVCacheWrapper": FlashInferDecode,
        },
    }
    for name, functions in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))
    monkeypatch.setattr(flashinfer, "_workspace", lambda device: torch.zeros(8, dtype=torch.uint8, device=device))


@every_claim
@pytest.mark.usefixtures("stand_ins")
def test_what_the_library_is_asked_for_is_what_the_workload_asks(backend: Backend, phase: Phase, name: str) -> None:
    case = make_case(phase, WORKLOADS[phase][name], shape_for(backend))
    assert case.problems(case.answer(backend)) == []


@pytest.mark.parametrize("backend", [FlashInferTensorCores, FlashInferCudaCores], ids=lambda backend: backend.name)
@pytest.mark.usefixtures("stand_ins")
def test_a_captured_plan_is_planned_anew_before_each_replay(backend: Backend) -> None:
    shape = shape_for(backend)
    bound = backend(Phase.DECODE, shape)

    def case_of(*kv_lens: int) -> Case:
        return make_case(Phase.DECODE, replace(MIXED[Phase.DECODE], lens=tuple((1, n) for n in kv_lens)), shape)

    plan = bound.plan_capture(case_of(300, 300, 300).batch)
    buffers = plan.wrapper.captured
    assert [len(buffer) for buffer in buffers.values() if isinstance(buffer, Tensor)] == [4, 3 * 19, 3]
    for lens in ((1, 17, 300), (5, 0, 0)):
        case = case_of(*lens)
        bound.update_capture(plan, case.batch)
        assert case.problems(bound.run(plan, case.q, case.k, case.v)) == []
    assert plan.wrapper.planned == 3


def test_a_plan_waits_until_the_one_before_was_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noted(name: str) -> Callable[..., None]:
        return lambda *_, **__: calls.append(name)

    event = SimpleNamespace(record=noted("record"), synchronize=noted("wait"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    planned = PlannedWrapper(SimpleNamespace(plan=noted("plan")))
    planned.plan()
    planned.plan()
    assert calls == ["plan", "record", "wait", "plan", "record"]


# The libraries themselves.


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


@every_claim
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


@every_phase
@pytest.mark.parametrize("page_size", [1, 64, 128, 256])
def test_page_size_equals_the_oracle_on_a_gpu(backend: Backend, phase: Phase, page_size: int) -> None:
    if phase is Phase.VISION:
        pytest.skip("there are no pages in vision")
    subject = on_the_gpu(backend, phase, page_size=page_size)
    assert problems_of(subject, subject.case(MIXED[phase])) == []


@every_phase
@pytest.mark.parametrize("window", [None, 50])
def test_graph_replay_equals_the_oracle_on_a_gpu(backend: Backend, phase: Phase, window: int | None) -> None:
    if not backend.limits[phase].graphs or (window and not backend.limits[phase].windows):
        pytest.skip("not claimed")
    assert graph_replay(on_the_gpu(backend, phase), window) == []
