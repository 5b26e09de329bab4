"""Naive attention, broken in one way each: what the conformance kit has to find."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from tessera.attention.backends.naive import Naive, NaivePart
from tessera.attention.contract import Batch, Claim, Limits, Phase, Shape

LIMITS = Limits(dtypes=(torch.float32, torch.bfloat16), devices=("cpu",), windows=True, soft_caps=True, sinks=True)
INVARIANT = replace(LIMITS, batch_invariant=("cpu",))


class Mutant(Naive):
    """Naive attention that a subclass breaks in one way."""

    name: ClassVar[str] = "mutant"
    limits: ClassVar[dict[Phase, Limits]] = {Phase.PREFILL: LIMITS, Phase.DECODE: LIMITS}


class IgnoresWindow(Mutant):
    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, replace(shape, window=None))


class IgnoresSoftCap(Mutant):
    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, replace(shape, soft_cap=None))


class IgnoresSinks(Mutant):
    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return super().run(plan, q, k, v, None if sinks is None else torch.full_like(sinks, -torch.inf))


class FixedScale(Mutant):
    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, replace(shape, scale=shape.head_dim**-0.5))


class NanInPaddingRows(Mutant):
    def plan(self, batch: Batch) -> list[NaivePart]:
        self.padding = [row for row, kv_len in enumerate(batch.kv_lens_cpu) if kv_len == 0]
        return super().plan(batch)

    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        out = super().run(plan, q, k, v, sinks)
        out[self.padding] = torch.nan
        return out


class WritesIntoPages(Mutant):
    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        out = super().run(plan, q, k, v, sinks)
        k[-1] = 0
        return out


class ScalesQueriesInPlace(Mutant):
    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        out = super().run(plan, q, k, v, sinks)
        q.mul_(self.shape.scale)
        return out


class ReturnsFloat32(Mutant):
    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return super().run(plan, q, k, v, sinks).float()


class WrongForHeadsOf80(Mutant):
    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        if self.shape.head_dim == 80:
            v = torch.cat((v[..., :64], torch.zeros_like(v[..., 64:])), -1)
        return super().run(plan, q, k, v, sinks)


class SwapsGroups(Mutant):
    """Takes every other query head for a key head, not neighbours."""

    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        group = self.shape.group
        if group != 4:
            return super().run(plan, q, k, v, sinks)
        kv_heads = self.shape.num_kv_heads
        swapped = q.view(len(q), group, kv_heads, -1).transpose(1, 2).flatten(1, 2)
        out = super().run(plan, swapped, k, v, sinks)
        return out.view(len(q), kv_heads, group, -1).transpose(1, 2).flatten(1, 2)


class PagesOf16Only(Mutant):
    def plan(self, batch: Batch) -> list[NaivePart]:
        if self.shape.page_size != 16:
            raise ValueError(f"page size {self.shape.page_size}")
        return super().plan(batch)


class DependsOnCompany(Mutant):
    limits: ClassVar[dict[Phase, Limits]] = {Phase.PREFILL: INVARIANT, Phase.DECODE: INVARIANT}

    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return super().run(plan, q, k, v, sinks) * (1 + 2e-7 * (len(q) % 5))


class KeepsTheFirstPlan(Mutant):
    """Keeps its plan for every step with as many tokens."""

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        self.plans: dict[tuple[int, ...], list[NaivePart]] = {}

    def plan(self, batch: Batch) -> list[NaivePart]:
        return self.plans.setdefault((*batch.q_lens_cpu, *batch.kv_lens_cpu), super().plan(batch))


class KeepsTheFirstLayer(Mutant):
    """Gathers keys and values once a step, as if all layers had the same."""

    def plan(self, batch: Batch) -> list[NaivePart]:
        self.pools: tuple[Tensor, Tensor] | None = None
        return super().plan(batch)

    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        self.pools = self.pools or (k, v)
        return super().run(plan, q, *self.pools, sinks)


class TakesQueriesAsContiguous(Mutant):
    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return super().run(plan, q.as_strided(q.shape, (q[0].numel(), q.shape[2], 1)), k, v, sinks)


class TakesTablesAsContiguous(Mutant):
    def plan(self, batch: Batch) -> list[NaivePart]:
        table = batch.page_table
        return super().plan(replace(batch, page_table=table.as_strided(table.shape, (table.shape[1], 1))))


class AcceptsAnything(Mutant):
    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        return []


class ClaimsNothing(Mutant):
    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        return Claim(())


class ClaimsAnotherKernel(Mutant):
    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        return Claim(("flash_fwd_kernel",))


class NeedsAPageSize(Mutant):
    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        return super().reasons_against(phase, shape) or ([] if shape.page_size else ["no page size"])


class NotInstalled(Mutant):
    needs: ClassVar[tuple[str, ...]] = ("no_such_module_of_ours",)


class OtherDevice(Mutant):
    limits: ClassVar[dict[Phase, Limits]] = {Phase.DECODE: Limits((torch.float16,), min_capability=(9, 0))}


class WithGraphs(Mutant):
    limits: ClassVar[dict[Phase, Limits]] = {Phase.DECODE: replace(LIMITS, graphs=True)}


class FailsToImport(Mutant):
    needs: ClassVar[tuple[str, ...]] = ("wheel_that_does_not_import",)


class DecodeHere(Mutant):
    """Prefills on a GPU only."""

    limits: ClassVar[dict[Phase, Limits]] = {Phase.PREFILL: replace(LIMITS, devices=("cuda",)), Phase.DECODE: LIMITS}


class RefusesFloat32(Mutant):
    """As a kernel that takes fewer types on this device than its limits can say."""

    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        reasons = super().reasons_against(phase, shape)
        return reasons or (["no float32 here"] if shape.dtype is torch.float32 else [])


class NoUsualSize(Mutant):
    limits: ClassVar[dict[Phase, Limits]] = {Phase.DECODE: replace(LIMITS, head_dims=(48,))}


class RaisesWhenAsked(Mutant):
    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        raise ValueError("broken")
