"""Prefix cache: which pages already hold the beginning of a sequence.

The hash of a full page covers its tokens and, through the hash before it, all tokens before them
(a chain, as in a Merkle list), so an equal hash means an equal prefix. 128 bits of BLAKE2b: a
collision, which would serve another prompt's keys, is out of reach of accident and of search.
"""

from __future__ import annotations

from hashlib import blake2b
from struct import Struct

from tessera.scheduler.pages import PagePool
from tessera.step import Step
from tessera.types import Sequence


class PrefixCache:
    """Finds pages of `pool` by the tokens that they hold.

    enabled  where not, nothing is found and nothing remembered
    """

    def __init__(self, pool: PagePool, page_size: int, *, enabled: bool) -> None:
        self._pool, self._page_size, self._enabled = pool, page_size, enabled
        self._pack_page = Struct(f"{page_size}q").pack

    def find(self, sequence: Sequence) -> list[int]:
        """The longest run of pages that hold the beginning of `sequence`, not yet held for it.

        At least the last known token stays to be computed, since its logits are needed.
        """
        if sequence.wants_prompt_logprobs or not self._enabled:
            return []
        found: list[int] = []
        for index in range((len(sequence.token_ids) - 1) // self._page_size):
            self._extend_hashes(sequence, index + 1)
            page = self._pool.find(sequence.page_hashes[index])
            if page is None:
                break
            found.append(page)
        return found

    def remember(self, step: Step) -> None:
        """Let the pages that a step has filled be found by later sequences; its last tokens are known."""
        if not self._enabled:
            return
        rows = (step.kv_lens % self._page_size < step.q_lens).nonzero()[0]  # those that have come past a page's end
        if not len(rows):
            return
        q_lens, kv_lens = step.q_lens[rows], step.kv_lens[rows]
        first, last = (kv_lens - q_lens) // self._page_size, kv_lens // self._page_size
        for row, start, end in zip(rows.tolist(), first.tolist(), last.tolist()):
            sequence = step.sequences[row]
            if sequence.finished or not sequence.pages:  # one preempted since holds none
                continue
            self._extend_hashes(sequence, end)
            self._pool.remember(sequence.pages[start:end], sequence.page_hashes[start:end])

    def _extend_hashes(self, sequence: Sequence, num_pages: int) -> None:
        """Make `sequence.page_hashes` cover its first `num_pages` full pages."""
        hashes, page_size = sequence.page_hashes, self._page_size
        start, end = len(hashes) * page_size, num_pages * page_size
        if start >= end:
            return
        pack_all = self._pack_page if end - start == page_size else Struct(f"{end - start}q").pack
        tokens = pack_all(*sequence.token_ids[start:end])
        parent, width = hashes[-1] if hashes else b"tessera", 8 * page_size
        for first in range(0, len(tokens), width):
            parent = blake2b(parent + tokens[first : first + width], digest_size=16).digest()
            hashes.append(parent)
