"""Our kernels are compiled while others are imported, and nobody times before they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attention_cases import make_shape
from tessera.attention import choose, early
from tessera.attention.contract import Phase
from tessera.config import AttentionConfig

PHASES = (Phase.PREFILL, Phase.DECODE)


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """What is set up, by which thread, on which device; setting up takes a moment."""
    seen: list[tuple[str, str, int]] = []
    devices = threading.local()

    class Backend:
        def __init__(self, phase: Phase, _: Any) -> None:
            self.phase = phase

    def test(backend: Any) -> None:
        time.sleep(0.05)
        seen.append((str(backend.phase), threading.current_thread().name, devices.current))

    monkeypatch.setattr(early, "load_backend", lambda name: Backend if name == "triton" else pytest.fail(name))
    monkeypatch.setattr(early, "self_test_problem", test)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: setattr(devices, "current", device))
    return seen


def test_on_a_gpu_all_phases_are_compiled_by_a_thread_that_is_waited_for(set_up: list[Any]) -> None:
    with early.compiling_early(PHASES, [replace(make_shape(), device_type="cuda")]):
        assert set_up == []
    assert set_up == [("prefill", "compiling", 3), ("decode", "compiling", 3)]


@pytest.mark.parametrize(("phases", "device_type"), [(PHASES, "cpu"), ((), "cuda")])
def test_on_a_cpu_or_for_no_phase_nothing_is(set_up: list[Any], phases: tuple[Phase, ...], device_type: str) -> None:
    with early.compiling_early(phases, [replace(make_shape(), device_type=device_type)]):
        pass
    assert set_up == []


@pytest.mark.usefixtures("set_up")
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_fails_is_left_to_whoever_times_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def fail(backend: Any) -> None:
        tried.append(backend.phase)
        raise RuntimeError("does not compile")

    monkeypatch.setattr(early, "self_test_problem", fail)
    with early.compiling_early(PHASES, [replace(make_shape(), device_type="cuda")]):
        pass
    assert tried == [Phase.PREFILL]


def test_auto_compiles_for_the_phases_that_it_chooses_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen: list[Any] = []

    @contextmanager
    def compiling(phases: Any, shapes: Any) -> Iterator[None]:
        seen.append((tuple(phases), shapes[0].device_type))
        yield

    monkeypatch.setattr(choose, "compiling_early", compiling)
    choose.build_attention(AttentionConfig(decode_attention="naive"), [make_shape()], None, 64)
    choose.build_attention(AttentionConfig(), [make_shape()], None, 64)
    assert seen == [((Phase.PREFILL,), "cpu"), (PHASES, "cpu")]
