"""Shapes and checks that the tests of attention share; the workloads are tessera's own."""

from __future__ import annotations

from typing import Any

import torch

from tessera.attention.contract import AttentionBackend, Phase, Shape
from tessera.attention.workloads import Case

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
PAGED = [Phase.PREFILL, Phase.DECODE]


def make_shape(
    *,
    q_heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 32,
    page_size: int | None = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    window: int | None = None,
    **features: Any,
) -> Shape:
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    return Shape(q_heads, kv_heads, head_dim, head_dim**-0.5, dtype, device, capability, page_size, window, **features)


def check(case: Case, backend: type[AttentionBackend[Any]]) -> None:
    """The backend's answer is the oracle's, within the rounding of the type."""
    assert case.problems(case.answer(backend)) == []
