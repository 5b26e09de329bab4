"""The sizes of step that CUDA graphs are recorded for, and what a step is padded to."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

LENGTHS = (512, 2048, 8192, 32768)
"""Longest sequences that graphs are recorded for, before the model's own longest: a backend that is told of shorter
ones cuts them into fewer pieces."""
DECODES = (0, 16, 64, 128, 256)
"""Numbers of decodes that are recorded beside prompts, before the most that there can be."""
FEWEST_TOKENS = 64
"""Of prompts; every power of two from here on is recorded."""
TOKENS_PER_PROMPT = 32
"""A graph of so many times as many tokens takes one more prompt."""
FEWEST_PROMPTS = 4
WORTH_LAUNCHING = 6e12
"""Operations of a step's products, padding included, from which on the device takes longer than the host takes to
launch the step."""
MOST_TABLE_BYTES = 2**20
"""Of page tables that go over with each step that has prompts: a tenth of a millisecond. Longer sequences are
launched."""


class GraphSize(NamedTuple):
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
        prompts = f" + {self.prompts} prompts of {self.tokens} tokens" if self.prompts else ""
        return f"{self.decodes}{prompts}, of {self.longest}"


@dataclass(frozen=True)
class GraphLimits:
    """The largest steps that graphs will be replayed with."""

    max_num_seqs: int
    max_model_len: int
    page_size: int
    num_pages: int
    most_tokens: int = 0
    """Of prompts in a step; 0: steps of decodes alone."""
    most_rows: int = 0
    """Tokens of a padded step with prompts, decodes included."""

    def worth(self, max_num_batched_tokens: int, num_weights: int) -> GraphLimits:
        """With prompts as far as they are worth it, for a model of so many weights that each token is multiplied by."""
        tokens = FEWEST_TOKENS
        while tokens < max_num_batched_tokens and 2 * num_weights * 2 * tokens <= WORTH_LAUNCHING:
            tokens *= 2
        return replace(self, most_tokens=tokens, most_rows=int(WORTH_LAUNCHING / (2 * max(1, num_weights))))

    @cached_property
    def decodes(self) -> list[int]:
        """Numbers of decodes to record: close enough that at most a fifth of a step, or three rows, is padding."""
        sizes = [1, 2, 4]
        while sizes[-1] < self.max_num_seqs:
            sizes.append(sizes[-1] + max(4, sizes[-1] // 32 * 8))
        return [size for size in sizes if size < self.max_num_seqs] + [self.max_num_seqs]

    @property
    def most_pages(self) -> int:
        """That a sequence may have."""
        return -(-self.max_model_len // self.page_size)

    def longest(self, kv_len: int) -> int:
        """The longest sequence that a graph for one of `kv_len` tokens is recorded for."""
        return self._lengths[min(bisect_left(self._lengths, kv_len), len(self._lengths) - 1)]

    @cached_property
    def _lengths(self) -> list[int]:
        return [*(each for each in LENGTHS if each < self.max_model_len), self.max_model_len]

    def size(self, decodes: int, tokens: int, prompts: int, kv_len: int) -> GraphSize | None:
        """The least recorded size that takes such a step; None where none does.

        tokens  of prompts, `prompts` in number
        kv_len  of the longest sequence
        """
        if prompts:
            return self._size_with_prompts(decodes, tokens, prompts, kv_len)
        if decodes > self.max_num_seqs:
            return None
        return GraphSize(self.decodes[bisect_left(self.decodes, decodes)], 0, 0, self.longest(kv_len))

    def _size_with_prompts(self, decodes: int, tokens: int, prompts: int, kv_len: int) -> GraphSize | None:
        most = self.max_num_seqs
        rows = next((each for each in DECODES if decodes <= each <= most), most)
        padded = FEWEST_TOKENS
        while padded <= self.most_tokens:
            room = min(most, max(FEWEST_PROMPTS, padded // TOKENS_PER_PROMPT))
            if tokens <= padded and prompts <= room:
                size = GraphSize(rows, padded, room, self.longest(kv_len))
                return size if decodes <= rows and self._is_worth(size) else None
            padded *= 2
        return None

    def _is_worth(self, size: GraphSize) -> bool:
        pages = -(-size.longest // self.page_size)
        return size.decodes + size.tokens <= self.most_rows and 4 * size.sampling * pages <= MOST_TABLE_BYTES
