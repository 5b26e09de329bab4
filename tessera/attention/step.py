"""One step's attention: new keys and values into the pages once a layer, then each phase to its backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tessera.attention.contract import AttentionBackend, Batch, Phase
from tessera.kernels.pages import write_pages


class Attention:
    """The backends of a model, made once: one a phase and group of layers that ask the same of it.

    backends      of each phase, one a group
    layer_groups  of each layer, its group
    """

    def __init__(self, backends: Mapping[Phase, Sequence[AttentionBackend[Any]]], layer_groups: Sequence[int]) -> None:
        self._backends = {phase: tuple(of_phase) for phase, of_phase in backends.items()}
        self._layer_groups = tuple(layer_groups)

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
            _Part(tokens, of_phase, tuple(backend.plan(batch) for backend in of_phase))
            for phase, (tokens, batch) in batches.items()
            for of_phase in (self._backends[phase],)
        )
        return StepAttention(k_pages, v_pages, slots, parts, self._layer_groups, padded=num_real < len(slots))


@dataclass(frozen=True)
class _Part:
    """The tokens of one phase, with a backend and a plan for each group of layers."""

    tokens: slice
    backends: tuple[AttentionBackend[Any], ...]
    plans: tuple[Any, ...]


class StepAttention:
    """What a model calls to attend: `attend(layer, q, k, v)`, once a layer."""

    def __init__(
        self,
        k_pages: Sequence[Tensor],
        v_pages: Sequence[Tensor],
        slots: Tensor,
        parts: tuple[_Part, ...],
        layer_groups: tuple[int, ...],
        *,
        padded: bool,
    ) -> None:
        self._k_pages, self._v_pages, self._slots = k_pages, v_pages, slots
        self._parts, self._layer_groups, self._padded = parts, layer_groups, padded
        self._covered = sum(part.tokens.stop - part.tokens.start for part in parts) == len(slots)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the step's keys and values, then attend; tokens of no batch come back as zeros.

        q        [tokens, q_heads, head_dim]
        k, v     [tokens, kv_heads, head_dim]
        returns  [tokens, q_heads, head_dim]
        """
        k_pages, v_pages, group = self._k_pages[layer], self._v_pages[layer], self._layer_groups[layer]
        write_pages(k, v, k_pages, v_pages, self._slots, padded=self._padded)
        if len(self._parts) == 1 and self._covered:
            part = self._parts[0]
            return part.backends[group].run(part.plans[group], q, k_pages, v_pages)
        out = q.new_empty(q.shape) if self._covered else q.new_zeros(q.shape)
        for part in self._parts:
            out[part.tokens] = part.backends[group].run(part.plans[group], q[part.tokens], k_pages, v_pages)
        return out
