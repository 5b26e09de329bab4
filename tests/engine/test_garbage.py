"""The garbage collector leaves alone what was there before the steps, and only while they run."""

from __future__ import annotations

import gc

import pytest

from tessera.engine.garbage import keep_what_is_there


def test_what_is_there_is_set_aside_while_steps_run_and_given_back() -> None:
    before = gc.get_freeze_count()
    with pytest.raises(ValueError, match="a step fails"), keep_what_is_there():  # noqa: PT012
        assert gc.get_freeze_count() > before
        raise ValueError("a step fails")
    assert gc.get_freeze_count() == 0
