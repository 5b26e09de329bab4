"""Inputs of one step: from sequences on the host to tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.attention.contract import Batch, Phase
from tessera.runner.page_table import PageTable
from tessera.runner.rows import rows_among
from tessera.runner.transfer import Array, to_device
from tessera.step import Step
from tessera.types import Sequence


@dataclass(frozen=True)
class StepInputs:
    """What the model needs to compute one step, on the device."""

    token_ids: Tensor
    """[tokens] int64"""
    positions: Tensor
    """[tokens] int64"""
    slots: Tensor
    """[tokens] int64: page * page_size + offset, where each token's key and value go."""
    batches: dict[Phase, tuple[slice, Batch]]
    """The tokens of each phase, and its sequences."""
    first_rows: dict[Sequence, int]
    """Row of the first token of each sequence that wants logprobs of its prompt."""
    sampling: list[Sequence]
    """Sequences whose next token is sampled, in the order of `sampling_rows`."""
    sampling_rows: Tensor
    """[sampling] int64: row of each one's last token."""


@dataclass(frozen=True)
class HostInputs:
    """A step as arrays; a token's sequences stand as in the step."""

    q_lens: NDArray[np.int64]
    """[sequences] tokens that are new."""
    kv_lens: NDArray[np.int64]
    """[sequences] tokens that are in the cache afterwards."""
    token_ids: NDArray[np.int64]
    """[tokens], 0 where one is pending."""
    sources: NDArray[np.int64]
    """[tokens] where a pending token stands in what the step before sampled, -1 for a known one."""
    positions: NDArray[np.int64]
    """[tokens]"""
    slots: NDArray[np.int64]
    """[tokens]"""
    table: NDArray[np.int32]
    """[sequences, most pages or more]"""
    samples: NDArray[np.bool_]
    """[sequences] whether the next token is sampled."""


class LastSampled(NamedTuple):
    """What the step before sampled, on the device."""

    sequences: list[Sequence]
    token_ids: Tensor
    """[sequences or more] int64"""


class InputBuilder:
    """Turns steps over pools of `num_pages` into tensors on `device`, one step after another."""

    def __init__(self, num_pages: int, page_size: int, device: torch.device) -> None:
        self._num_pages, self._page_size, self._device = num_pages, page_size, device
        self._page_table = PageTable()

    def build(self, step: Step, last: LastSampled | None = None) -> StepInputs:
        """The step's tokens, decodes first, each phase with its batch.

        last  where tokens are that are pending: of the step before this one
        """
        return self.bring_over(step, self.build_on_host(step, last), last)

    def bring_over(self, step: Step, host: HostInputs, last: LastSampled | None) -> StepInputs:
        """What `build_on_host` made of a step, on the device."""
        q_lens, cu_q_lens = host.q_lens, np.concatenate([[0], np.cumsum(host.q_lens)])
        rows = cu_q_lens[1:][host.samples] - 1
        parts = _parts(q_lens)
        arrays: list[Array] = [host.token_ids, host.positions, host.slots, rows, *_pending(host)]
        for part in parts.values():
            most_pages = -(-int(host.kv_lens[part].max()) // self._page_size)
            arrays.append((cu_q_lens[part.start : part.stop + 1] - cu_q_lens[part.start]).astype(np.int32))
            arrays += [host.kv_lens[part].astype(np.int32), np.ascontiguousarray(host.table[part, :most_pages])]
        token_ids, positions, slots, sampling_rows, targets, sources, *rest = to_device(arrays, self._device)
        if len(targets):
            assert last is not None
            token_ids = token_ids.index_copy(0, targets, last.token_ids[sources])
        batches: dict[Phase, tuple[slice, Batch]] = {}
        for number, (phase, part) in enumerate(parts.items()):
            batch = self._batch(host, part, *rest[3 * number : 3 * number + 3])
            batches[phase] = slice(int(cu_q_lens[part.start]), int(cu_q_lens[part.stop])), batch
        first_rows = {s: int(row) for s, row in zip(step.sequences, cu_q_lens) if s in step.owed_logprobs}
        return StepInputs(token_ids, positions, slots, batches, first_rows, step.sampling, sampling_rows)

    def build_on_host(self, step: Step, last: LastSampled | None = None) -> HostInputs:
        """A step as arrays, before any of it goes to the device; they last until the next step's."""
        q_lens, starts, num_tokens = step.q_lens, step.kv_lens - step.q_lens, int(step.q_lens.sum())
        table = self._page_table.of(step.sequences, -(-step.kv_lens // self._page_size))
        if num_tokens == len(q_lens):
            rows, positions = np.arange(num_tokens), starts
        else:
            rows = np.repeat(np.arange(len(q_lens)), q_lens)
            positions = np.arange(num_tokens) - np.repeat(np.cumsum(q_lens) - q_lens - starts, q_lens)
        pages = table[rows, positions // self._page_size].astype(np.int64)
        token_ids, sources = _token_ids(step, last)
        return HostInputs(
            q_lens=q_lens,
            kv_lens=step.kv_lens,
            token_ids=token_ids,
            sources=sources,
            positions=positions,
            slots=pages * self._page_size + positions % self._page_size,
            table=table,
            samples=step.samples,
        )

    def _batch(self, host: HostInputs, part: slice, cu_q_lens: Tensor, kv_lens: Tensor, table: Tensor) -> Batch:
        q_lens_cpu, kv_lens_cpu = host.q_lens[part].tolist(), host.kv_lens[part].tolist()
        return Batch(
            q_lens_cpu=q_lens_cpu,
            kv_lens_cpu=kv_lens_cpu,
            cu_q_lens=cu_q_lens,
            kv_lens=kv_lens,
            page_table=table,
            max_q_len=max(q_lens_cpu),
            max_kv_len=max(kv_lens_cpu),
            num_pages=self._num_pages,
        )


def _parts(q_lens: NDArray[np.int64]) -> dict[Phase, slice]:
    """The sequences of each phase that is there."""
    num_decodes = int((q_lens == 1).sum())  # they stand first
    parts = {Phase.DECODE: slice(0, num_decodes), Phase.PREFILL: slice(num_decodes, len(q_lens))}
    return {phase: part for phase, part in parts.items() if part.stop > part.start}


def _token_ids(step: Step, last: LastSampled | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[tokens] the token ids, 0 where one is pending; [tokens] where those stand in `last`, -1 for all others."""
    if step.pending.all():  # as wherever steps of decodes overlap: the only new token of each
        return np.zeros(len(step.pending), np.int64), _sources(step.sequences, last)
    known: list[int] = []
    for row in np.nonzero(~step.pending | (step.q_lens > 1))[0].tolist():
        end = step.kv_lens[row]
        known += step.sequences[row].token_ids[end - step.q_lens[row] : end]
    token_ids, sources = np.zeros((2, int(step.q_lens.sum())), np.int64)
    targets = np.cumsum(step.q_lens)[step.pending] - 1
    sources[:] = -1
    sources[targets] = _sources([step.sequences[row] for row in np.nonzero(step.pending)[0].tolist()], last)
    token_ids[sources < 0] = known
    return token_ids, sources


def _sources(sequences: list[Sequence], last: LastSampled | None) -> NDArray[np.int64]:
    """[sequences] where each one's pending token stands in `last`."""
    before = last.sequences if last is not None else []
    rows = np.arange(len(sequences)) if sequences is before else rows_among(sequences, before)
    assert (rows >= 0).all(), "a token is pending that the step before has not sampled"
    return rows


def _pending(host: HostInputs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens that are pending, and where each stands in what the step before sampled."""
    targets = np.nonzero(host.sources >= 0)[0]
    return targets, host.sources[targets]
