"""What graphs read: the arrays of a step, in memory on the device that stays.

Decodes stand first and are padded to one of a few numbers of rows, the prompts' tokens behind them to one of a few
numbers of tokens. All of it goes to the device in one copy, straight to where graphs read it; where in that memory
each array lies is a matter of the size. Page tables of decodes alone stay there from step to step, for they seldom
change.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.runner.graph_sizes import MOST_TABLE_BYTES, GraphLimits, GraphSize
from tessera.runner.inputs import HostInputs
from tessera.runner.parameters import SamplingRows
from tessera.runner.transfer import TORCH_TYPES, Staging, aligned

PADDING_SLOT = -1
_OF_TOKENS = {"token_ids": 0, "sources": -1, "positions": 0, "slots": PADDING_SLOT}
"""The arrays of HostInputs that have an entry a token, and what padding is in them."""


class StaticInputs:
    """Memory that the arrays of all sizes share, and the page table of steps of decodes alone.

    storage     [bytes] uint8
    page_table  [sequences, pages] int32; a graph of fewer sequences reads the first rows
    staging     of as many bytes on the host
    """

    def __init__(self, limits: GraphLimits, device: torch.device, staging: Staging | None = None) -> None:
        """staging: by default one of the device's."""
        self.limits, num_bytes = limits, storage_bytes(limits)
        self.storage = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.staging = Staging(num_bytes, device) if staging is None else staging
        self.page_table = torch.zeros(limits.max_num_seqs, limits.most_pages, dtype=torch.int32, device=device)
        self.table_version = -1
        """Of the host's table, when it was sent last; what other steps do to that one gives it another."""


class GraphInputs:
    """The arrays of one size of step, as views of the memory that all sizes share."""

    def __init__(self, size: GraphSize, static: StaticInputs) -> None:
        self.size, self._static = size, static
        found = spans(size, static.limits.page_size)
        end = found[-1].end
        self._arrays = {each.name: each.of(static.storage) for each in found}
        if not size.prompts:
            self._arrays["decode_table"] = static.page_table[: size.decodes]
        self._there = static.storage[:end]
        self._pinned = [buffer[:end] for buffer in static.staging.buffers]
        self._table_start = start = aligned(end)
        self._table_there = static.storage[start:].view(torch.int32)
        self._table_staged = [buffer[start:].view(torch.int32).numpy() for buffer in static.staging.buffers]
        self._staged: list[dict[str, NDArray[Any]]] = [
            {each.name: each.of(buffer).numpy() for each in found} for buffer in static.staging.buffers
        ]

    def __getitem__(self, name: str) -> Tensor:
        """One array, see `layout`; the page table of decodes alone too."""
        return self._arrays[name]

    def clear(self) -> None:
        """Nothing but padding: a step that writes to no page."""
        self._there.zero_()
        for name, value in _OF_TOKENS.items():
            self[name].fill_(value)

    def write(self, host: HostInputs, sampling: SamplingRows, num_tokens: NDArray[np.int64]) -> None:
        """A step that is padded to this size, in one copy that the host does not wait for.

        sampling    of the rows that are sampled, each of `num_tokens` tokens
        """
        static, turn = self._static, self._static.staging.turn()
        arrays, count = self._staged[turn], host.num_decodes
        for name, value in _OF_TOKENS.items():
            self._fill(arrays[name], getattr(host, name), count, value)
        sampling.write(arrays["parameters"], num_tokens)
        lens = arrays["decode_lens"]
        lens[:count], lens[count:] = host.kv_lens[:count], 0
        if self.size.prompts:
            self._fill_prompts(arrays, host)
        elif host.table_version != static.table_version:
            self._send_with_table(turn, host)
            static.table_version = host.table_version
            return
        static.staging.send(self._pinned[turn], self._there)

    def _fill(self, array: NDArray[Any], values: NDArray[Any], count: int, padding: int) -> None:
        """Decodes, then the tokens of prompts, each with padding behind them."""
        first, decodes = self.size.decodes, values[:count]
        array[:count], array[count:first] = decodes, padding
        if self.size.prompts:
            end = first + len(values) - count
            array[first:end], array[end:] = values[count:], padding

    def _fill_prompts(self, arrays: dict[str, NDArray[Any]], host: HostInputs) -> None:
        """All that only steps with prompts have."""
        count, prompts = host.num_decodes, len(host.q_lens) - host.num_decodes
        ends = np.cumsum(host.q_lens)
        rows, sampled = arrays["sampling_rows"], ends[host.samples] - 1
        sampled[sampled >= count] += self.size.decodes - count
        rows[: len(sampled)], rows[len(sampled) :] = sampled, 0
        lens, starts = arrays["prompt_lens"], arrays["cu_q_lens"]
        lens[:prompts], lens[prompts:] = host.kv_lens[count:], 0
        starts[0], starts[1 : prompts + 1], starts[prompts + 1 :] = 0, ends[count:] - count, ends[-1] - count
        for name, part in (("decode_table", host.table[:count]), ("prompt_table", host.table[count:])):
            table, width = arrays[name], min(host.table.shape[1], arrays[name].shape[1])
            table[: len(part), :width], table[: len(part), width:], table[len(part) :] = part[:, :width], 0, 0

    def _send_with_table(self, turn: int, host: HostInputs) -> None:
        """Decodes whose pages have changed: their table goes over behind the arrays, and from there into its place.

        All that the host's table holds, so that the same version never holds more than was sent.
        """
        static = self._static
        table = host.table[:, : static.page_table.shape[1]]
        rows, width = table.shape
        self._table_staged[turn][: table.size].reshape(table.shape)[...] = table
        end = self._table_start + 4 * table.size
        static.staging.send(static.staging.buffers[turn][:end], static.storage[:end])
        static.page_table[:rows, :width].copy_(self._table_there[: table.size].view(rows, width))


class Span(NamedTuple):
    """Where an array lies among the bytes."""

    name: str
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, storage: Tensor) -> Tensor:
        """The array."""
        return storage[self.start : self.end].view(self.dtype).view(self.shape)


def spans(size: GraphSize, page_size: int) -> list[Span]:
    """The arrays of `layout`, one behind the other."""
    found, start = [], 0
    for name, (dtype, shape) in layout(size, page_size).items():
        num_bytes = prod(shape) * dtype.itemsize
        found.append(Span(name, start, start + num_bytes, TORCH_TYPES[dtype], shape))
        start += aligned(num_bytes)
    return found


def layout(size: GraphSize, page_size: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Names, types and shapes of the arrays that a step is made of.

    token_ids, sources, positions, slots  a token: as in HostInputs
    parameters                            of each row that may be sampled: see runner.parameters
    decode_lens, prompt_lens              tokens of each sequence in the cache
    sampling_rows                         with prompts: the token behind which each row is sampled
    cu_q_lens                             prefix sums of the prompts' new tokens
    decode_table, prompt_table            with prompts: pages
    """
    tokens, width = size.decodes + size.tokens, -(-size.longest // page_size)
    int64, int32, float64 = np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.float64)
    arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        **dict.fromkeys(_OF_TOKENS, (int64, (tokens,))),
        "parameters": (float64, (size.sampling, 5)),
        "decode_lens": (int32, (size.decodes,)),
    }
    if not size.prompts:
        return arrays
    return arrays | {
        "sampling_rows": (int64, (size.sampling,)),
        "prompt_lens": (int32, (size.prompts,)),
        "cu_q_lens": (int32, (size.prompts + 1,)),
        "decode_table": (int32, (size.decodes, width)),
        "prompt_table": (int32, (size.prompts, width)),
    }


def storage_bytes(limits: GraphLimits) -> int:
    """Of the memory that the arrays of any recorded size fit into, and a page table behind those of decodes alone."""
    most = limits.max_num_seqs
    largest = GraphSize(most, limits.most_tokens, most, limits.page_size)
    tables = max(4 * most * limits.most_pages, MOST_TABLE_BYTES if limits.most_tokens else 0)
    return aligned(spans(largest, limits.page_size)[-1].end) + aligned(tables)
