"""How long a call takes: on a GPU nobody waits for who is hopeless. The device here is one that only says how long."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from attention_cases import make_shape
from tessera.attention import timing
from tessera.attention.backends.naive import Naive
from tessera.attention.contract import Phase
from tessera.attention.step import Bucket
from tessera.attention.timing import CallTime, make_inputs, time_call


class Counted(Naive):
    """Tells how often it was called."""

    calls: ClassVar[int] = 0

    def run(self, *arguments: Any) -> torch.Tensor:
        Counted.calls += 1
        return super().run(*arguments)


def time_prefill(monkeypatch: pytest.MonkeyPatch, give_up_ms: float) -> tuple[CallTime, int]:
    """What is measured of calls that take a device a second each, and how many were made after the first."""

    def second(call: Any, _flush: Any) -> float:
        call()
        return 1000.0

    inputs = make_inputs(Phase.PREFILL, make_shape(), Bucket(1, 4, 4))
    bound = Counted(Phase.PREFILL, inputs.shape)
    monkeypatch.setattr(timing, "event_ms", second)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **given: empty(*size, **given | {"device": "cpu"}))
    on_cuda = replace(inputs, shape=replace(inputs.shape, device_type="cuda"))
    Counted.calls = 0
    return time_call(bound, on_cuda, repeats=3, give_up_ms=give_up_ms), Counted.calls - 1


def test_after_a_call_that_takes_too_long_on_a_gpu_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, calls = time_prefill(monkeypatch, 999.0)
    assert (taken.run_ms, calls) == (1000.0, 1)


def test_calls_that_are_quick_enough_are_timed_on_the_device_and_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, calls = time_prefill(monkeypatch, 1001.0)
    assert (taken.run_ms, calls) == (1000.0, 3 + 6)
