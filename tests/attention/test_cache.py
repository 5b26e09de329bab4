"""Measurements on disk: where they cannot be kept it is said once, and what never was is not called unreadable."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from plug_ins import SHAPE, config
from tessera.attention.choose import build_attention
from tessera.folders import cache_folder


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What tessera logs at `warning` and above."""
    with caplog.at_level(logging.WARNING, logger="tessera"):
        yield caplog


def build() -> None:
    """Choose for both phases, by measurement."""
    build_attention(config(attention_measure="cached"), [SHAPE], None, 64)


def test_a_folder_that_cannot_be_written_is_said_once_for_both_phases(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    build()
    (record,) = said.records
    assert record.getMessage().startswith("the measurement of attention is not kept, every start measures anew: ")


def test_a_user_without_a_home_is_told_so_once(monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    build()
    (record,) = said.records
    assert record.getMessage().endswith("there is no home folder, and XDG_CACHE_HOME is not set")


def test_a_folder_that_is_not_there_yet_is_made_in_silence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "yet"))
    build()
    assert said.records == [] and len(list((cache_folder() / "attention").iterdir())) == 2
