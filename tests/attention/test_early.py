"""Our kernels are compiled while others are imported, and nobody times before they are."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from attention_cases import make_shape
from tessera.attention import early
from tessera.attention.contract import Phase

PHASES = (Phase.PREFILL, Phase.DECODE)


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is set up, and by which thread."""
    seen: list[tuple[str, str]] = []

    class Backend:
        def __init__(self, phase: Phase, _: Any) -> None:
            self.phase = phase

    def test(backend: Any) -> None:
        seen.append((str(backend.phase), threading.current_thread().name))

    monkeypatch.setattr(early, "load_backend", lambda name: Backend if name == "triton" else pytest.fail(name))
    monkeypatch.setattr(early, "self_test_problem", test)
    return seen


def test_on_a_gpu_all_phases_are_compiled_by_a_thread_that_is_waited_for(set_up: list[tuple[str, str]]) -> None:
    with early.compiling_early(PHASES, [replace(make_shape(), device_type="cuda")]):
        pass
    assert set_up == [("prefill", "compiling"), ("decode", "compiling")]


def test_on_a_cpu_nothing_is(set_up: list[tuple[str, str]]) -> None:
    with early.compiling_early(PHASES, [replace(make_shape(), device_type="cpu")]):
        pass
    assert set_up == []


def test_what_fails_is_left_to_whoever_times_it(monkeypatch: pytest.MonkeyPatch, set_up: list[Any]) -> None:
    monkeypatch.setattr(early, "self_test_problem", lambda _: 1 / 0)
    with early.compiling_early(PHASES, [replace(make_shape(), device_type="cuda")]):
        pass
    assert set_up == []
