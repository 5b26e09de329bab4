"""What auto measured is kept on disk under all it depends on, and believed there only; a named backend is not timed."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from known_speeds import SIZED, SMALL, Fast, build
from tessera.attention import cache, prove
from tessera.attention.contract import Phase

pytestmark = pytest.mark.usefixtures("folder")


def test_what_was_measured_is_read_back_fast_and_alike(timed: list[Phase]) -> None:
    _, first = build()
    started = time.perf_counter()
    _, second = build()
    assert time.perf_counter() - started < 0.5  # 0.02 s on a machine that does nothing else
    assert timed == [Phase.PREFILL, Phase.DECODE]
    for phase, choice in second.items():
        assert choice == replace(first[phase], reason="auto: measured before")


def test_reading_a_measurement_takes_less_than_a_tenth_of_a_second() -> None:
    build()
    key = cache.make_key(Phase.DECODE, {SIZED: 2}, SMALL)
    started = time.process_time()
    assert cache.read(key) is not None
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize("damage", ["", "{", "\xff", '{"key": {}, "found": {"buckets": []}}', '{"key": 3}'])
def test_a_damaged_measurement_is_made_anew_and_said(
    folder: Path, timed: list[Phase], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    build()
    for path in folder.iterdir():
        path.write_text(damage, encoding="latin-1")
    with caplog.at_level(logging.WARNING, logger="tessera"):
        _, choices = build()
    assert choices["decode"].reason == "auto: measured" and len(timed) == 4
    assert "made anew" in caplog.text
    build()
    assert len(timed) == 4


def test_a_file_of_another_key_is_not_believed(folder: Path, timed: list[Phase]) -> None:
    """As after a collision, or a copy by hand."""
    build()
    for path in folder.iterdir():
        stored = json.loads(path.read_text())
        stored["key"]["device"] = "another"
        path.write_text(json.dumps(stored))
    build()
    assert len(timed) == 4


def test_the_key_changes_with_everything_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(phase: Phase = Phase.DECODE, shape: Any = SIZED, count: int = 2) -> str:
        return str(cache.make_key(phase, {shape: count}, SMALL))

    keys = [
        key(),
        key(Phase.PREFILL),
        key(shape=replace(SIZED, head_dim=64)),
        key(shape=replace(SIZED, dtype=torch.bfloat16)),
        key(shape=replace(SIZED, page_size=32)),
        key(shape=replace(SIZED, window=9)),
        key(count=3),
    ]
    assert key() == keys[0]
    for module, name, value in (
        (prove, "version", lambda package: f"{package} 999"),
        (cache, "machine", lambda _: {"device": "another processor"}),
        (cache, "code_digest", lambda _: "another"),
        (torch, "get_num_threads", lambda: 77),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, value)
            keys.append(key())
    monkeypatch.setattr(torch, "__version__", "99.0")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_force_measures_anew_and_off_not_at_all(timed: list[Phase]) -> None:
    build()
    build(attention_measure="force")
    assert len(timed) == 4
    _, choices = build(attention_measure="off")
    assert len(timed) == 4
    assert choices["decode"].backend == "slow"  # it stands first
    assert choices["decode"].buckets == []


def test_a_named_backend_is_neither_timed_nor_overridden(timed: list[Phase]) -> None:
    _, choices = build(attention="slow")
    assert timed == [] and {choice.backend for choice in choices.values()} == {"slow"}
    _, choices = build(decode_attention="slow", attention_measure="force")
    assert timed == [Phase.PREFILL]
    assert (choices["prefill"].backend, choices["decode"].backend) == ("fast", "slow")
    assert choices["decode"].reason == "named"


def test_a_folder_that_cannot_be_written_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, timed: list[Phase]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build()[1]["decode"].backend == "fast"
    build()
    assert len(timed) == 4


def test_a_kept_winner_that_can_no_longer_serve_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, timed: list[Phase]
) -> None:
    build()
    monkeypatch.setattr(Fast, "needs", ("no_such_module",))
    choice = build()[1]["decode"]
    assert (choice.backend, choice.reason) == ("slow", "auto: no other is timed here")
    assert len(timed) == 4
