"""Where the tests of models keep theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tessera.model.source import ModelSource


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a test's model is saved."""
    return tmp_path / "tiny"


@pytest.fixture
def source(folder: Path) -> ModelSource:
    """The model that the test saved there."""
    return ModelSource("folder", folder, "tiny")
