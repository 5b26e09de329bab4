"""Prefix cache: which pages already hold the beginning of a sequence.

The hash of a full page covers its tokens and, through the hash before it, all tokens before them
(a chain, as in a Merkle list), so an equal hash means an equal prefix. 128 bits of BLAKE2b: a
collision, which would serve another prompt's keys, is out of reach of accident and of search.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from tessera.scheduler.pages import PagePool
from tessera.types import Sequence


def extend_hashes(sequence: Sequence, num_pages: int, page_size: int) -> None:
    """Make `sequence.page_hashes` cover its first `num_pages` full pages."""
    hashes = sequence.page_hashes
    while len(hashes) < num_pages:
        start = len(hashes) * page_size
        tokens = array("q", sequence.token_ids[start : start + page_size])
        parent = hashes[-1] if hashes else b"tessera"
        hashes.append(blake2b(parent + tokens.tobytes(), digest_size=16).digest())


def find_prefix(sequence: Sequence, pool: PagePool, page_size: int) -> list[int]:
    """The longest run of pages in `pool` that hold the beginning of `sequence`, not yet held for it.

    At least the last known token stays to be computed, since its logits are needed.
    """
    if sequence.wants_prompt_logprobs:
        return []
    num_pages = (len(sequence.token_ids) - 1) // page_size
    found: list[int] = []
    for index in range(num_pages):
        extend_hashes(sequence, index + 1, page_size)
        page = pool.find(sequence.page_hashes[index])
        if page is None:
            break
        found.append(page)
    return found


def remember_pages(sequence: Sequence, start: int, end: int, pool: PagePool, page_size: int) -> None:
    """Let the pages that tokens `[start, end)` of `sequence` have filled be found by later sequences."""
    first, last = start // page_size, end // page_size
    if first == last:
        return
    extend_hashes(sequence, last, page_size)
    for index in range(first, last):
        pool.remember(sequence.pages[index], sequence.page_hashes[index])
