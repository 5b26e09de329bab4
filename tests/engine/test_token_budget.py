"""How many tokens a step has where nobody says."""

from __future__ import annotations

import pytest

from tessera.config import EngineConfig
from tessera.engine.build import token_budget


@pytest.mark.parametrize(
    ("device", "num_bytes", "budget"),
    [("cpu", 1, 1024), ("cpu", 10**11, 1024), ("cuda", 4 * 10**9 - 1, 16384), ("cuda", 4 * 10**9, 8192)],
)
def test_the_token_budget_follows_device_and_weights_where_none_is_given(
    device: str, num_bytes: int, budget: int
) -> None:
    assert token_budget(EngineConfig(), device, num_bytes) == budget
    assert token_budget(EngineConfig.from_flat({"max_num_batched_tokens": 77}), device, num_bytes) == 77
