"""Inputs of one step: from sequences on the host to tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from struct import pack
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


@dataclass(slots=True)
class HostInputs:
    """A step as arrays, which are only read; tokens and sequences stand as in the step, decodes first."""

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
    table_version: int
    """See PageTable."""
    samples: NDArray[np.bool_]
    """[sequences] whether the next token is sampled."""
    num_decodes: int
    """Sequences with one new token."""


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
        self._rows: NDArray[np.int64] = np.arange(0)

    def build(self, step: Step, last: LastSampled | None = None) -> StepInputs:
        """The step's tokens, decodes first, each phase with its batch.

        last  where tokens are that are pending: of the step before this one
        """
        return self.bring_over(step, self.build_on_host(step, last), last)

    def bring_over(self, step: Step, host: HostInputs, last: LastSampled | None) -> StepInputs:
        """What `build_on_host` made of a step, on the device."""
        cu_q_lens = np.concatenate([[0], np.cumsum(host.q_lens)])
        rows = cu_q_lens[1:][host.samples] - 1
        parts = _parts(host)
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
        q_lens, page_size, num_seqs = step.q_lens, self._page_size, len(step.q_lens)
        starts, num_tokens = step.kv_lens - q_lens, int(q_lens.sum())
        if len(self._rows) < num_seqs:
            self._rows = np.arange(num_seqs)
        rows, positions, num_decodes = self._rows[:num_seqs], starts, num_seqs
        if num_tokens > num_seqs:
            num_decodes = int((q_lens == 1).sum())
            rows = np.repeat(rows, q_lens)
            positions = np.arange(num_tokens) - np.repeat(np.cumsum(q_lens) - q_lens - starts, q_lens)
        numbers = positions // page_size  # of pages within their sequences
        counts = numbers + 1 if num_tokens == num_seqs else -(-step.kv_lens // page_size)
        table = self._page_table.of(step.sequences, counts)
        token_ids, sources = self._token_ids(step, last, num_tokens)
        return HostInputs(
            q_lens=q_lens,
            kv_lens=step.kv_lens,
            token_ids=token_ids,
            sources=sources,
            positions=positions,
            slots=(table[rows, numbers].astype(np.int64) - numbers) * page_size + positions,
            table=table,
            table_version=self._page_table.version,
            samples=step.samples,
            num_decodes=num_decodes,
        )

    def _token_ids(
        self, step: Step, last: LastSampled | None, num_tokens: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[tokens] the token ids, 0 where one is pending; [tokens] where those stand in `last`, -1 for all others."""
        num_seqs = len(step.pending)
        if step.pending.all():  # as wherever steps of decodes overlap: the only new token of each
            return np.zeros(num_seqs, np.int64), self._sources(step.sequences, last)
        known = bytearray()
        lens, ends, pending = step.q_lens.tolist(), step.kv_lens.tolist(), step.pending.tolist()
        for sequence, q_len, end, is_pending in zip(step.sequences, lens, ends, pending):
            count = q_len - is_pending
            known += pack(f"{count}q", *sequence.token_ids[end - q_len : end - is_pending])
        sources = np.full(num_tokens, -1)
        if len(known) == 8 * num_tokens:
            return np.frombuffer(known, np.int64), sources
        token_ids = np.zeros(num_tokens, np.int64)
        targets = np.cumsum(step.q_lens)[step.pending] - 1
        sources[targets] = self._sources(list(compress(step.sequences, pending)), last)
        token_ids[sources < 0] = np.frombuffer(known, np.int64)
        return token_ids, sources

    def _sources(self, sequences: list[Sequence], last: LastSampled | None) -> NDArray[np.int64]:
        """[sequences] where each one's pending token stands in `last`."""
        before = last.sequences if last is not None else []
        rows = self._rows[: len(sequences)] if sequences is before else rows_among(sequences, before)
        assert (rows >= 0).all(), "a token is pending that the step before has not sampled"
        return rows

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


def _parts(host: HostInputs) -> dict[Phase, slice]:
    """The sequences of each phase that is there."""
    num_decodes = host.num_decodes
    parts = {Phase.DECODE: slice(0, num_decodes), Phase.PREFILL: slice(num_decodes, len(host.q_lens))}
    return {phase: part for phase, part in parts.items() if part.stop > part.start}


def _pending(host: HostInputs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens that are pending, and where each stands in what the step before sampled."""
    targets = np.nonzero(host.sources >= 0)[0]
    return targets, host.sources[targets]
