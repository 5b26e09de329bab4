"""What `tessera verify` launches for many sequences: options and shares that no other of its checks comes to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tessera.attention import checks, tune_store
from tessera.attention.backends import triton_choice, triton_decode
from tessera.attention.backends.naive import Naive, NaivePart
from tessera.attention.backends.triton import Triton
from tessera.attention.backends.triton_choice import shipped
from tessera.attention.backends.triton_decode import Decode, DecodePlan
from tessera.attention.checks import Subject
from tessera.attention.contract import Phase
from tessera.attention.reference import reference_attention
from tessera.attention.verify import base_shape, verify
from triton_interpreter import DEVICE, check_in_interpreter, needs_kernels, outside_interpreter

H200 = (132, 227 << 10)


@pytest.mark.timeout(600)
@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


def launched(monkeypatch: pytest.MonkeyPatch, sms: int = H200[0]) -> dict[tuple[int, int], DecodePlan]:
    """(sequences, head_dim) -> how triton planned what verify's checks ask of it in float16 on such a Hopper GPU.

    No kernel runs, which would take the interpreter a minute: the oracle answers.
    """
    found: dict[tuple[int, int], DecodePlan] = {}

    def answer(decode: Decode, plan: DecodePlan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        found[len(plan.batch.kv_lens_cpu), decode.shape.head_dim] = plan
        return reference_attention(Phase.DECODE, decode.shape, plan.batch, q, k, v, sinks).to(q.dtype)

    for module in (triton_choice, triton_decode):
        monkeypatch.setattr(module, "device_resources", lambda _: (sms, H200[1]))
        monkeypatch.setattr(module, "gpu_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(tune_store, "read", lambda *_: None)
    monkeypatch.setattr(Decode, "run", answer)
    shape = replace(base_shape(Triton, Phase.DECODE, torch.float16, DEVICE), capability=(9, 0))
    assert checks.many_sequences(Subject(Triton, Phase.DECODE, shape)) == []
    return found


@needs_kernels
def test_verify_launches_the_options_for_many_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launched(monkeypatch)
    for size in checks.MANY_HEAD_DIMS:
        plan, few = found[len(checks.MANY.lens), size], found[3, size]
        shape = replace(base_shape(Triton, Phase.DECODE, torch.float16, DEVICE), head_dim=size, capability=(9, 0))
        choice = shipped(Phase.DECODE, shape, H200[1], "NVIDIA H200")
        assert choice.many != choice.few
        assert plan.options == choice.many and few.options != choice.many
        assert plan.shares.balanced and plan.shares.runs is choice.many.runs
    assert {plan.shares.runs for plan in found.values()} == {True, False}  # equal runs of blocks as well


@needs_kernels
def test_they_are_many_on_the_largest_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launched(monkeypatch, sms=188)
    plans = [plan for (num_seqs, _), plan in found.items() if num_seqs == len(checks.MANY.lens)]
    assert [plan.options.label for plan in plans] == ["64 w2 s5 p6/6 min128", "32 w1 s4 p4/8 min256 runs"]


def test_verify_asks_for_many_sequences_in_decode_alone() -> None:
    report = verify(Naive, phases=[Phase.PREFILL, Phase.DECODE], dtypes=[torch.float32])
    assert [check.phase for check in report.checks if check.label == "use/many_sequences"] == [Phase.DECODE]


class WrongForMany(Naive):
    """Right for up to 32 sequences."""

    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        out = super().run(plan, q, k, v, sinks)
        return out if len(q) <= 32 else out * 1.5


def test_a_backend_that_is_wrong_for_many_sequences_alone_is_found() -> None:
    report = verify(WrongForMany, phases=[Phase.DECODE], dtypes=[torch.float32])
    (check,) = report.failed
    assert check.label == "use/many_sequences" and "(48 sequences, heads of 64)" in check.detail
