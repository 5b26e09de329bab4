"""Backends of known speed in the place of ours, and engines' attention chosen among them: for tests of auto."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, ClassVar

import torch

from attention_cases import make_shape
from tessera.attention.backends.naive import Naive
from tessera.attention.choose import build_attention
from tessera.attention.contract import Limits, Phase
from tessera.attention.step import Attention, Bucket
from tessera.config import AttentionConfig
from tessera.types import AttentionChoice

SHAPE = make_shape(page_size=None)
SIZED = replace(SHAPE, page_size=16)
STEADY = {phase: replace(limits, batch_invariant=("cpu",)) for phase, limits in Naive.limits.items()}
SMALL = [Bucket(2, 1, 40), Bucket(1, 1, 20)]


class Fast(Naive):
    name: ClassVar[str] = "fast"
    limits: ClassVar[dict[Phase, Limits]] = STEADY


class Slow(Fast):
    name: ClassVar[str] = "slow"
    needs: ClassVar[tuple[str, ...]] = ()

    def run(self, *arguments: Any) -> torch.Tensor:
        time.sleep(0.01)
        return super().run(*arguments)


class Hopeless(Fast):
    """So slow that nobody waits for it twice."""

    name: ClassVar[str] = "hopeless"
    calls: ClassVar[int] = 0

    def run(self, *arguments: Any) -> torch.Tensor:
        Hopeless.calls += 1
        time.sleep(0.5)
        return super().run(*arguments)


class Wrong(Fast):
    name: ClassVar[str] = "wrong"

    def run(self, *arguments: Any) -> torch.Tensor:
        return super().run(*arguments) * 1.1


class Rung(Fast):
    """As fast, preferred, and there to be compared."""

    name: ClassVar[str] = "rung"
    rung: ClassVar[str | None] = "an idea"


class Unsteady(Fast):
    name: ClassVar[str] = "unsteady"
    limits: ClassVar[dict[Phase, Limits]] = Naive.limits


def build(**settings: Any) -> tuple[Attention, dict[str, AttentionChoice]]:
    attention, _, choices = build_attention(AttentionConfig(**settings), [SHAPE, SHAPE], None)
    return attention, {choice.phase: choice for choice in choices}
