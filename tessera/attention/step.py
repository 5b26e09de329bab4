"""One step's attention: new keys and values into the pages once a layer, then each phase to its backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from math import log2
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend, Batch, Phase, Shape
from tessera.kernels.fused import fused_on
from tessera.kernels.pages import write_pages
from tessera.kernels.turn import Turn

TurnAndWrite = Callable[[Tensor, Tensor, Tensor, Turn, Tensor, Tensor, Tensor], Tensor]
"""kernels.rope_pages.rope_pages: turns q and k, writes k and v, returns q."""
Observe = Callable[[int, Tensor, Tensor, Batch], None]
"""(layer, q, k_pages, batch) of one phase, q turned and the step's keys written."""


class Bucket(NamedTuple):
    """A size of step, and by nearness all those like it."""

    num_seqs: int
    q_len: int
    kv_len: int

    @property
    def label(self) -> str:
        """`8 x 512`: sequences and tokens each holds; `1 x 128 of 512` where only some of them are new."""
        new = "" if self.q_len in (1, self.kv_len) else f"{self.q_len} of "
        return f"{self.num_seqs} x {new}{self.kv_len}"

    def distance(self, other: Bucket) -> float:
        """How unlike two sizes are: the factors between their numbers, each as a power of two, added up."""
        return sum(abs(log2(max(1, mine) / max(1, theirs))) for mine, theirs in zip(self, other))


class Attention:
    """The backends of a model, made once: one a phase and group of layers that ask the same of it.

    backends      of each phase, one a group
    layer_groups  of each layer, its group
    buckets       of the phases whose steps are not all served alike: backends by size, used in place of `backends`
    fused         whether q and k may come as projected, to be turned by the kernel that writes pages; None: wherever
                  that runs
    """

    def __init__(
        self,
        backends: Mapping[Phase, Sequence[AttentionBackend[Any]]],
        layer_groups: Sequence[int],
        buckets: Mapping[Phase, Mapping[Bucket, Sequence[AttentionBackend[Any]]]] | None = None,
        *,
        fused: bool | None = None,
    ) -> None:
        self._backends = {phase: tuple(of_phase) for phase, of_phase in backends.items()}
        self._layer_groups = tuple(layer_groups)
        self._buckets = {
            phase: {bucket: tuple(bound) for bucket, bound in of_phase.items()}
            for phase, of_phase in (buckets or {}).items()
        }
        # Where one set serves every size no step's size is compared.
        self._only = {phase: bound[0] for phase in Phase if len(bound := list(self._by_size(phase))) == 1}
        self.fused = self._is_fused() if fused is None else fused
        self._observe: Observe | None = None
        self._turn_and_write: TurnAndWrite | None = None
        if self.fused:
            from tessera.kernels.rope_pages import rope_pages

            self._turn_and_write = rope_pages

    def _is_fused(self) -> bool:
        device_types = {b.shape.device_type for phase in Phase for bound in self.bound(phase) for b in bound}
        return any(fused_on(torch.device(device_type)) for device_type in device_types)

    def bound(self, phase: Phase) -> list[tuple[AttentionBackend[Any], ...]]:
        """Every set of backends that serves some step of a phase, one a group of layers."""
        of_phase = [self._backends[phase]] if phase in self._backends else []
        return list(dict.fromkeys([*of_phase, *self._buckets.get(phase, {}).values()]))

    def serving(self, phase: Phase, size: Bucket) -> tuple[AttentionBackend[Any], ...]:
        """The backends of a step of this size: those of the nearest bucket, of equally near ones the first."""
        if phase in self._only:
            return self._only[phase]
        buckets = self._buckets.get(phase)
        return buckets[min(buckets, key=size.distance)] if buckets else self._backends[phase]

    def _by_size(self, phase: Phase) -> set[tuple[AttentionBackend[Any], ...]]:
        """The sets that `serving` may name."""
        if self._buckets.get(phase):
            return set(self._buckets[phase].values())
        return {self._backends[phase]} if phase in self._backends else set()

    def buckets(self, phase: Phase) -> list[Bucket]:
        """The sizes of step that are told apart in a phase; [] where all are served alike."""
        return list(self._buckets.get(phase, {}))

    def layer_shapes(self, phase: Phase) -> list[Shape]:
        """What each layer asks in a phase."""
        return [self._backends[phase][group].shape for group in self._layer_groups]

    def watched(self, observe: Observe) -> Attention:
        """The same attention, which shows `observe` what every layer of its steps is about to attend to."""
        watched = copy(self)
        watched._observe = observe
        return watched

    def num_layers(self, group: int) -> int:
        """How many layers are in a group."""
        return self._layer_groups.count(group)

    def begin_step(
        self,
        k_pages: Sequence[Tensor],
        v_pages: Sequence[Tensor],
        slots: Tensor,
        batches: Mapping[Phase, tuple[slice, Batch]],
    ) -> StepAttention:
        """Plan one step; what comes back serves every layer of it, and no other step.

        k_pages, v_pages  of each layer, [pages, page_size, kv_heads, head_dim]
        slots             [tokens] int64: where each token's key and value go; negative only for padding,
                          which is a token of no batch or of a sequence whose kv_len is 0
        batches           of each phase in the step, its tokens and their sequences
        """
        num_real = sum(
            q_len
            for _, batch in batches.values()
            for q_len, kv_len in zip(batch.q_lens_cpu, batch.kv_lens_cpu)
            if kv_len > 0
        )
        parts = tuple(
            _Part(tokens, batch, of_phase, tuple(backend.plan(batch) for backend in of_phase))
            for phase, (tokens, batch) in batches.items()
            for of_phase in (self.serving(phase, _size(batch)),)
        )
        return StepAttention(
            k_pages,
            v_pages,
            slots,
            parts,
            self._layer_groups,
            padded=num_real < len(slots),
            turn_and_write=self._turn_and_write,
            observe=self._observe,
        )

    def graphs_refused(self, phase: Phase, backends: Sequence[AttentionBackend[Any]]) -> list[str]:
        """Why no CUDA graph may record steps that these backends attend to in a phase; [] where one may."""
        refusing = [each.name for each in backends if not each.limits[phase].graphs]
        reasons = [f"{name} does not allow it" for name in dict.fromkeys(refusing)]
        return reasons if self.fused else [*reasons, "keys are not written by the fused kernel"]

    def begin_capture(
        self,
        k_pages: Sequence[Tensor],
        v_pages: Sequence[Tensor],
        slots: Tensor,
        batches: Mapping[Phase, tuple[slice, Batch]],
        backends: Mapping[Phase, Sequence[AttentionBackend[Any]]],
    ) -> StepAttention:
        """Plan a step that a CUDA graph records, to be replayed with other numbers in the same tensors.

        batches   as in `begin_step`, with the longest lengths that will ever be replayed, in the order of their tokens
        backends  of each phase the set that serves the steps to come, see `serving`; none that `graphs_refused`
        """
        parts = tuple(
            _Part(tokens, batch, tuple(backends[phase]), tuple(each.plan_capture(batch) for each in backends[phase]))
            for phase, (tokens, batch) in batches.items()
        )
        return StepAttention(
            k_pages, v_pages, slots, parts, self._layer_groups, padded=True, turn_and_write=self._turn_and_write
        )


@dataclass(frozen=True)
class _Part:
    """The tokens of one phase, with a backend and a plan for each group of layers."""

    tokens: slice
    batch: Batch
    backends: tuple[AttentionBackend[Any], ...]
    plans: tuple[Any, ...]


class StepAttention:
    """What a model calls to attend: `attend(layer, q, k, v)`, once a layer; with a `turn` where that is `fused`."""

    def __init__(
        self,
        k_pages: Sequence[Tensor],
        v_pages: Sequence[Tensor],
        slots: Tensor,
        parts: tuple[_Part, ...],
        layer_groups: tuple[int, ...],
        *,
        padded: bool,
        turn_and_write: TurnAndWrite | None = None,
        observe: Observe | None = None,
    ) -> None:
        self._k_pages, self._v_pages, self._slots = k_pages, v_pages, slots
        self._parts, self._layer_groups, self._padded = parts, layer_groups, padded
        self._turn_and_write, self._observe = turn_and_write, observe
        ends = [0, *(part.tokens.stop for part in parts)]
        self._covered = ends[-1] == len(slots) and [part.tokens.start for part in parts] == ends[:-1]

    def update(self, *batches: Batch) -> None:
        """Before a graph that recorded this step is replayed: refresh what plans keep beside tensors.

        batches  one a phase, in the order in which they were recorded
        """
        for part, batch in zip(self._parts, batches, strict=True):
            for backend, plan in zip(part.backends, part.plans):
                backend.update_capture(plan, batch)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Turn | None = None, /) -> Tensor:
        """Write the step's keys and values, then attend; tokens of no batch come back as zeros.

        q        [tokens, q_heads, head_dim]
        k, v     [tokens, kv_heads, head_dim]
        turn     q and k are as projected, and this is done to them before
        returns  [tokens, q_heads, head_dim]
        """
        k_pages, v_pages, group = self._k_pages[layer], self._v_pages[layer], self._layer_groups[layer]
        if turn is None:
            write_pages(k, v, k_pages, v_pages, self._slots, padded=self._padded)
        elif self._turn_and_write is None:
            raise RuntimeError("a fused layer attends through attention that is not fused")
        else:
            q = self._turn_and_write(q, k, v, turn, k_pages, v_pages, self._slots)
        if self._observe is not None:
            for part in self._parts:
                self._observe(layer, q[part.tokens], k_pages, part.batch)
        if len(self._parts) == 1 and self._covered:
            part = self._parts[0]
            return part.backends[group].run(part.plans[group], q, k_pages, v_pages)
        answers = [
            part.backends[group].run(part.plans[group], q[part.tokens], k_pages, v_pages) for part in self._parts
        ]
        if self._covered:  # by parts that stand as their tokens do
            return torch.cat(answers)
        out = q.new_zeros(q.shape)
        for part, answer in zip(self._parts, answers):
            out[part.tokens] = answer
        return out


def _size(batch: Batch) -> Bucket:
    return Bucket(len(batch.q_lens_cpu), batch.max_q_len, batch.max_kv_len)
