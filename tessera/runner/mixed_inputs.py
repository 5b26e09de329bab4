"""What a recorded step with prompts in it is made of, in memory that stays.

Decodes stand first and are padded to one of a few numbers of rows, the prompts' tokens behind them to one of a few
numbers of tokens. All of it goes to the device in one copy; where in that memory each array lies is a matter of the
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.runner.graphs import PADDING_SLOT, GraphLimits
from tessera.runner.inputs import HostInputs

DECODES = (0, 16, 64, 128, 256)
"""Numbers of decodes that are recorded, before the most that there can be."""
FEWEST_TOKENS = 64
"""Of prompts; every power of two from here on is recorded."""
TOKENS_PER_PROMPT = 32
"""A graph of so many times as many tokens takes one more prompt."""
FEWEST_PROMPTS = 4
WORTH_LAUNCHING = 6e12
"""Operations of a step's products, padding included, from which on the device takes longer than the host takes to
launch the step."""
MOST_TABLE_BYTES = 2**20
"""Of page tables that go over with a step: a tenth of a millisecond. Longer sequences are launched."""
_ALIGNMENT = 256
_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64, np.dtype(np.float64): torch.float64}


@dataclass(frozen=True)
class MixedSize:
    """What a step is padded to."""

    decodes: int
    tokens: int
    """Of prompts."""
    prompts: int
    longest: int
    """Most tokens that any sequence holds."""

    @property
    def sampling(self) -> int:
        """Rows that may be sampled."""
        return self.decodes + self.prompts

    @property
    def label(self) -> str:
        """`16 + 4 prompts of 64 tokens, of 512`: for people."""
        return f"{self.decodes} + {self.prompts} prompts of {self.tokens} tokens, of {self.longest}"


@dataclass(frozen=True)
class MixedLimits:
    """The largest steps that graphs will be replayed with."""

    graphs: GraphLimits
    most_tokens: int
    """Of prompts in a step."""
    most_rows: int
    """Tokens of a padded step, decodes included."""

    @classmethod
    def worth(cls, graphs: GraphLimits, max_num_batched_tokens: int, num_weights: int) -> MixedLimits:
        """For a model of so many weights that each token is multiplied by."""
        tokens = FEWEST_TOKENS
        while tokens < max_num_batched_tokens and 2 * num_weights * 2 * tokens <= WORTH_LAUNCHING:
            tokens *= 2
        return cls(graphs, tokens, int(WORTH_LAUNCHING / (2 * max(1, num_weights))))

    def size(self, decodes: int, tokens: int, prompts: int, kv_len: int) -> MixedSize | None:
        """The least recorded size that takes such a step; None where none does."""
        most = self.graphs.max_num_seqs
        rows = next((each for each in DECODES if decodes <= each <= most), most)
        padded = FEWEST_TOKENS
        while padded <= self.most_tokens:
            room = min(most, max(FEWEST_PROMPTS, padded // TOKENS_PER_PROMPT))
            if tokens <= padded and prompts <= room:
                size = MixedSize(rows, padded, room, self.graphs.longest(kv_len))
                return size if decodes <= rows and self._is_worth(size) else None
            padded *= 2
        return None

    def _is_worth(self, size: MixedSize) -> bool:
        pages = -(-size.longest // self.graphs.page_size)
        return size.decodes + size.tokens <= self.most_rows and 4 * size.sampling * pages <= MOST_TABLE_BYTES

    @property
    def num_bytes(self) -> int:
        """Of the memory that the arrays of any recorded size fit into."""
        most = self.graphs.max_num_seqs
        largest = MixedSize(most, self.most_tokens, most, self.graphs.page_size)
        return spans(largest, self.graphs.page_size)[-1].end + MOST_TABLE_BYTES


class MixedInputs:
    """The arrays of one size of step, as views of memory that all sizes share."""

    def __init__(self, size: MixedSize, page_size: int, storage: Tensor) -> None:
        """storage: bytes on the device, as many as `spans` end at or more."""
        self.size = size
        self._spans, self._storage = spans(size, page_size), storage
        self._there = {each.name: each.of(storage) for each in self._spans}

    def __getitem__(self, name: str) -> Tensor:
        """One array, see `layout`."""
        return self._there[name]

    def write(self, arrays: dict[str, NDArray[Any]]) -> None:
        """All arrays, in one copy that the host does not wait for."""
        end = self._spans[-1].end
        pinned = torch.empty(end, dtype=torch.uint8, pin_memory=self._storage.is_cuda)  # kept until the copy is done
        packed = pinned.numpy()
        for each in self._spans:
            packed[each.start : each.end] = arrays[each.name].reshape(-1).view(np.uint8)
        self._storage[:end].copy_(pinned, non_blocking=True)


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


def spans(size: MixedSize, page_size: int) -> list[Span]:
    """The arrays of `layout`, one behind the other."""
    found, start = [], 0
    for name, (dtype, shape) in layout(size, page_size).items():
        num_bytes = prod(shape) * dtype.itemsize
        found.append(Span(name, start, start + num_bytes, _DTYPES[dtype], shape))
        start += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    return found


def layout(size: MixedSize, page_size: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Names, types and shapes of the arrays that a step is made of.

    token_ids, sources, positions, slots  a token: as in HostInputs
    sampling_rows                         the token behind which each row is sampled
    parameters                            of each row: see runner.parameters
    decode_lens, prompt_lens              tokens of each sequence in the cache
    cu_q_lens                             prefix sums of the prompts' new tokens
    decode_table, prompt_table            pages
    """
    tokens, width = size.decodes + size.tokens, -(-size.longest // page_size)
    int64, int32, float64 = np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.float64)
    return {
        "token_ids": (int64, (tokens,)),
        "sources": (int64, (tokens,)),
        "positions": (int64, (tokens,)),
        "slots": (int64, (tokens,)),
        "sampling_rows": (int64, (size.sampling,)),
        "parameters": (float64, (size.sampling, 5)),
        "decode_lens": (int32, (size.decodes,)),
        "prompt_lens": (int32, (size.prompts,)),
        "cu_q_lens": (int32, (size.prompts + 1,)),
        "decode_table": (int32, (size.decodes, width)),
        "prompt_table": (int32, (size.prompts, width)),
    }


def padded(
    host: HostInputs, size: MixedSize, parameters: NDArray[np.float64], page_size: int
) -> dict[str, NDArray[Any]]:
    """The arrays of a step, padded to a size that takes it.

    parameters  of the rows that are sampled: see runner.parameters
    """
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in layout(size, page_size).items()}
    arrays["sources"][:], arrays["slots"][:] = -1, PADDING_SLOT
    count, num_tokens = int((host.q_lens == 1).sum()), len(host.token_ids)
    prompts = len(host.q_lens) - count
    to = np.arange(num_tokens)
    to[count:] += size.decodes - count
    for name in ("token_ids", "sources", "positions", "slots"):
        arrays[name][to] = getattr(host, name)
    ends = np.cumsum(host.q_lens)
    rows = to[ends[host.samples] - 1]
    arrays["sampling_rows"][: len(rows)] = rows
    arrays["parameters"][: len(rows)] = parameters
    arrays["decode_lens"][:count] = host.kv_lens[:count]
    arrays["prompt_lens"][:prompts] = host.kv_lens[count:]
    arrays["cu_q_lens"][1 : prompts + 1] = ends[count:] - count
    arrays["cu_q_lens"][prompts + 1 :] = num_tokens - count
    width = min(host.table.shape[1], arrays["decode_table"].shape[1])
    arrays["decode_table"][:count, :width] = host.table[:count, :width]
    arrays["prompt_table"][:prompts, :width] = host.table[count:, :width]
    return arrays
