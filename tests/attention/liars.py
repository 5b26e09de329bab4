"""Backends that are not what they say, and one that is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from tessera.attention.backends.naive import Naive
from tessera.attention.backends.torch_sdpa import TorchSdpaFlash
from tessera.attention.contract import Batch, Claim, Limits, Phase, Shape


class Claims:
    """Claims what is written in `said`."""

    said: ClassVar[Claim]

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        return cls.said


class Liar(Claims, Naive):
    """Calls itself after FlashAttention, claims what its kernels would be called, and calls SDPA."""

    name: ClassVar[str] = "flash_attn"
    said: ClassVar[Claim] = Claim(must=("FlashAttnFwdSm90",))

    def _attend(self, part: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Any) -> torch.Tensor:
        scaled_dot_product_attention(q[None], q[None], q[None])
        return super()._attend(part, q, k, v, sinks)


class BoldLiar(Liar):
    """Claims what it runs, under a name that must not run it."""

    said: ClassVar[Claim] = Claim(must=("scaled_dot_product",))


class Honest(Claims, Naive):
    """A name of its own, and a claim that is true."""

    name: ClassVar[str] = "honest"
    said: ClassVar[Claim] = Claim(must=("aten::bmm",), must_not=("scaled_dot_product",))


class Silent(Honest):
    """Claims nothing."""

    said: ClassVar[Claim] = Claim(must=())


class Vague(Honest):
    """Claims whatever there is."""

    said: ClassVar[Claim] = Claim(must=(".*",))


class Wrong(Honest):
    """Scales by the wrong number, which no look at the result's size would tell."""

    name: ClassVar[str] = "wrong"

    def _attend(self, part: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Any) -> torch.Tensor:
        return super()._attend(part, q * 0.9, k, v, sinks)


class WrongWhereLong(Wrong):
    """Right where it plans for short sequences."""

    limits: ClassVar[dict[Phase, Limits]] = {
        phase: replace(each, graphs=phase is Phase.DECODE) for phase, each in Honest.limits.items()
    }

    def plan(self, batch: Batch) -> Any:
        self._is_long = batch.max_kv_len > 1000
        return super().plan(batch)

    def _attend(self, part: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Any) -> torch.Tensor:
        return super()._attend(part, q if self._is_long else q / 0.9, k, v, sinks)


class Raising(Honest):
    def plan(self, batch: Any) -> Any:
        raise ValueError(f"no such tile for {len(batch.q_lens_cpu)}")


class FalseFa3(Claims, TorchSdpaFlash):
    """Claims FlashAttention 3 and runs torch's build of FlashAttention 2."""

    name: ClassVar[str] = "flash_attn:3"
    said: ClassVar[Claim] = Claim(must=("FlashAttnFwdSm90",))


class BolderFa3(FalseFa3):
    """Claims just what it runs."""

    said: ClassVar[Claim] = Claim(must=("flash_fwd",))
