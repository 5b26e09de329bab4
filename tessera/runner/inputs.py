"""Inputs of one step: from sequences on the host to tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.attention.contract import Batch, Phase
from tessera.types import Sequence, Step


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
    """Row of each sequence's first token."""
    sampling: list[Sequence]
    """Sequences whose next token is sampled, in the order of `sampling_rows`."""
    sampling_rows: Tensor
    """[sampling] int64: row of each one's last token."""


class InputBuilder:
    """Turns a step over pools of `num_pages` into tensors on `device`."""

    def __init__(self, num_pages: int, page_size: int, device: torch.device) -> None:
        self._num_pages, self._page_size, self._device = num_pages, page_size, device

    def build(self, step: Step) -> StepInputs:
        """The step's tokens, decodes first, each phase with its batch."""
        sequences = list(step.num_tokens)
        q_lens = np.fromiter(step.num_tokens.values(), np.int64, len(sequences))
        starts = np.fromiter((s.num_computed_tokens for s in sequences), np.int64, len(sequences))
        ends = starts + q_lens
        cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)])
        positions = np.arange(cu_q_lens[-1]) - np.repeat(cu_q_lens[:-1] - starts, q_lens)
        page_table = _page_table(sequences)
        rows = np.repeat(np.arange(len(sequences)), q_lens)
        pages = page_table[rows, positions // self._page_size].astype(np.int64)
        sampling = [s for s in sequences if step.samples(s)]
        last_rows = {s: int(row) - 1 for s, row in zip(sequences, cu_q_lens[1:])}
        return StepInputs(
            token_ids=self._to_device(_token_ids(sequences, starts, ends)),
            positions=self._to_device(positions),
            slots=self._to_device(pages * self._page_size + positions % self._page_size),
            batches=self._batches(q_lens, ends, cu_q_lens, page_table),
            first_rows={s: int(row) for s, row in zip(sequences, cu_q_lens)},
            sampling=sampling,
            sampling_rows=self._to_device(np.array([last_rows[s] for s in sampling], np.int64)),
        )

    def _batches(
        self, q_lens: NDArray[np.int64], kv_lens: NDArray[np.int64], cu: NDArray[np.int64], table: NDArray[np.int32]
    ) -> dict[Phase, tuple[slice, Batch]]:
        num_decodes = int((q_lens == 1).sum())  # they stand first
        parts = {Phase.DECODE: slice(0, num_decodes), Phase.PREFILL: slice(num_decodes, len(q_lens))}
        return {
            phase: (
                slice(int(cu[part.start]), int(cu[part.stop])),
                self._batch(q_lens[part], kv_lens[part], table[part]),
            )
            for phase, part in parts.items()
            if part.stop > part.start
        }

    def _batch(self, q_lens: NDArray[np.int64], kv_lens: NDArray[np.int64], table: NDArray[np.int32]) -> Batch:
        cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        most_pages = -(-int(kv_lens.max()) // self._page_size)
        return Batch(
            q_lens_cpu=q_lens.tolist(),
            kv_lens_cpu=kv_lens.tolist(),
            cu_q_lens=self._to_device(cu_q_lens),
            kv_lens=self._to_device(kv_lens.astype(np.int32)),
            page_table=self._to_device(np.ascontiguousarray(table[:, :most_pages])),
            max_q_len=int(q_lens.max()),
            max_kv_len=int(kv_lens.max()),
            num_pages=self._num_pages,
        )

    def _to_device(self, array: NDArray[np.int64] | NDArray[np.int32]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _token_ids(sequences: list[Sequence], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    parts = [s.token_ids[start:end] for s, start, end in zip(sequences, starts.tolist(), ends.tolist())]
    return np.array([token_id for part in parts for token_id in part], np.int64)


def _page_table(sequences: list[Sequence]) -> NDArray[np.int32]:
    """[sequences, most pages] int32, zero where a sequence has no page."""
    table = np.zeros((len(sequences), max(len(s.pages) for s in sequences)), np.int32)
    for row, sequence in zip(table, sequences):
        row[: len(sequence.pages)] = sequence.pages
    return table
