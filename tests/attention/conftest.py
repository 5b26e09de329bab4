"""Fixtures of tests of auto: backends of known speed, and which phases were timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from known_speeds import SMALL, Fast, Slow, Unsteady, Wrong
from tessera.attention import cache, measure, registry
from tessera.attention import choose as choosing
from tessera.attention.contract import Phase
from tessera.attention.measure import Measured


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Backends of known speed in the place of ours, and an empty cache."""
    ours = {backend.name: f"known_speeds:{backend.__name__}" for backend in (Slow, Fast, Wrong, Unsteady)}
    for module in (registry, choosing, cache):
        monkeypatch.setattr(module, "BACKENDS", ours)
    monkeypatch.setattr(choosing, "AUTO", dict.fromkeys(Phase, ("slow", "fast")))
    monkeypatch.setattr(measure, "BUCKETS", {("cpu", phase): SMALL for phase in Phase})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tessera" / "attention"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Phase]:
    """The phases that were timed since."""
    phases: list[Phase] = []
    real = measure.measure

    def counted(phase: Phase, *arguments: Any) -> Measured:
        phases.append(phase)
        return real(phase, *arguments)

    monkeypatch.setattr(choosing, "measure", counted)
    return phases
