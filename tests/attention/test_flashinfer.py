"""flashinfer: what it refuses, and on stand-ins that do what its documentation says, what it asks for and when."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_library_cases import HOPPER, Backend, attend, every_claim, shape_for, unpaged
from tessera.attention.backends import flashinfer
from tessera.attention.backends.flashinfer import (
    FlashInferCudaCores,
    FlashInferFa2,
    FlashInferFa3,
    FlashInferTensorCores,
    PlannedWrapper,
)
from tessera.attention.checks import MIXED
from tessera.attention.contract import Phase
from tessera.attention.workloads import WORKLOADS, Case, make_case


@pytest.mark.parametrize(
    ("backend", "phase", "change", "reason"),
    [
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
    """A module of the library's name."""
    wrappers = {
        "BatchPrefillWithPagedKVCacheWrapper": FlashInferWrapper,
        "BatchPrefillWithRaggedKVCacheWrapper": FlashInferRagged,
        "BatchDecodeWithPagedKVCacheWrapper": FlashInferDecode,
    }
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(**wrappers))
    monkeypatch.setattr(flashinfer, "_workspace", lambda device: torch.zeros(8, dtype=torch.uint8, device=device))


@every_claim(FlashInferFa2, FlashInferFa3, FlashInferTensorCores, FlashInferCudaCores)
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
    monkeypatch.setattr(flashinfer, "make_event", lambda: event)
    planned = PlannedWrapper(SimpleNamespace(plan=noted("plan")))
    planned.plan()
    planned.plan()
    assert calls == ["plan", "record", "wait", "plan", "record"]
