"""What the tests of flash_attn and flashinfer share: shapes, marks, and the plain arithmetic behind their stand-ins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import make_shape
from tessera.attention.backends.flash_attn import FlashAttn2, FlashAttn3, FlashAttn4
from tessera.attention.backends.flashinfer import (
    FlashInferCudaCores,
    FlashInferFa2,
    FlashInferFa3,
    FlashInferTensorCores,
)
from tessera.attention.contract import AttentionBackend, Phase, Shape
from tessera.attention.workloads import WORKLOADS

Backend = type[AttentionBackend[Any]]

BACKENDS: tuple[Backend, ...] = (
    FlashAttn4,
    FlashAttn3,
    FlashAttn2,
    FlashInferFa2,
    FlashInferFa3,
    FlashInferTensorCores,
    FlashInferCudaCores,
)
PHASES = [(backend, phase) for backend in BACKENDS for phase in backend.limits]
HOPPER = Shape(9, 3, 64, 0.125, torch.bfloat16, "cuda", (9, 0), 256)


def shape_for(backend: Backend, **sizes: Any) -> Shape:
    page_size = 256 if backend is FlashAttn2 else 16
    return make_shape(**{"dtype": torch.bfloat16, "head_dim": 64, "page_size": page_size, **sizes})


def claimed(backend: Backend, phase: Phase) -> Iterable[str]:
    """The workloads that the limits allow on Hopper."""
    for name, workload in WORKLOADS[phase].items():
        shape = workload.bind(phase, replace(shape_for(backend), device_type="cuda", capability=(9, 0)))
        if not backend.limits[phase].problems(shape):
            yield name


def of_phases(pairs: Iterable[tuple[Backend, Phase]]) -> pytest.MarkDecorator:
    """Each of these backends in its phase."""
    return pytest.mark.parametrize(("backend", "phase"), list(pairs), ids=lambda part: getattr(part, "name", part))


every_phase = of_phases(PHASES)


def every_claim(*backends: Backend) -> pytest.MarkDecorator:
    """Each workload that one of these backends serves on Hopper."""
    claims = [
        (backend, phase, name) for backend, phase in PHASES if backend in backends for name in claimed(backend, phase)
    ]
    return pytest.mark.parametrize(("backend", "phase", "name"), claims, ids=lambda part: getattr(part, "name", part))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    cap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """One sequence, masks aligned to the lower right corner, windows inclusive; no keys give zeros."""
    group, left, right = q.shape[1] // k.shape[1], *window
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    ahead = torch.arange(len(k)) - torch.arange(len(k) - len(q), len(k))[:, None]
    hidden = (ahead > 0) & causal
    hidden |= ahead > (right if right is not None and right >= 0 else len(k))
    hidden |= -ahead > (left if left is not None and left >= 0 else len(k))
    extra = q.new_full((q.shape[1],), -torch.inf) if sink is None else sink
    column = extra.double()[:, None, None].expand(-1, len(q), 1)
    weights = torch.cat((scores.masked_fill(hidden, -torch.inf), column), -1).softmax(-1)[..., :-1].nan_to_num()
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def unpaged(pool: Tensor, pages: Tensor, length: int) -> Tensor:
    return pool[pages.long()].flatten(0, 1)[:length]
