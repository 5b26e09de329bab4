"""Pages: equal pieces of KV memory, and who holds them.

A page is free, held (count > 0) or remembered (count 0, still found by its hash). Only this module
moves a page between the three. A remembered page is taken back, least recently used first, when no
free one is left; a held page is never taken.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class PagePool:
    """Hands out page numbers `[0, num_pages)` and remembers which full page holds which tokens."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._counts = [0] * num_pages
        self._hashes: list[bytes | None] = [None] * num_pages
        self._pages_by_hash: dict[bytes, int] = {}
        self._remembered: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that `take` can still hand out: free ones and remembered ones."""
        return len(self._free) + len(self._remembered)

    def take(self, num_pages: int) -> list[int]:
        """Hold `num_pages` pages nobody holds; their old content may be overwritten.

        The caller has checked `num_available`; ValueError where it has not.
        """
        if num_pages > self.num_available:
            raise ValueError(f"{num_pages} pages asked, {self.num_available} available")
        free, counts = self._free, self._counts
        taken = free[: -num_pages - 1 : -1] if num_pages else []
        del free[len(free) - len(taken) :]
        for page in taken:
            counts[page] = 1
        return taken + [self._take_back() for _ in range(num_pages - len(taken))]

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages that are held or remembered already, for one more sequence."""
        for page in pages:
            if self._counts[page] == 0:
                del self._remembered[page]
            self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Give up one hold of each page, given in the order of the sequence they belong to.

        Pages with a hash stay remembered. The last page of a sequence is forgotten first, because a
        prefix is of no use without the pages before it.
        """
        for page in reversed(list(pages)):
            self._counts[page] -= 1
            if self._counts[page] > 0:
                continue
            if self._hashes[page] is None:
                self._free.append(page)
            else:
                self._remembered[page] = None

    def remember(self, pages: Iterable[int], page_hashes: Iterable[bytes]) -> None:
        """Let held, full pages be found by their hashes; the first page with a hash stays the one found."""
        hashes, found = self._hashes, self._pages_by_hash
        for page, page_hash in zip(pages, page_hashes):
            if hashes[page] is None and page_hash not in found:
                hashes[page] = page_hash
                found[page_hash] = page

    def find(self, page_hash: bytes) -> int | None:
        """The held or remembered page with this hash; it may be lost unless it is held next."""
        return self._pages_by_hash.get(page_hash)

    def is_held(self, page: int) -> bool:
        """Whether any sequence holds the page."""
        return self._counts[page] > 0

    def check(self, tables: Iterable[list[int]]) -> None:
        """Raise AssertionError unless `tables` (one page list a sequence) explain every hold, and nothing leaks."""
        expected = [0] * self.num_pages
        for table in tables:
            assert len(set(table)) == len(table), f"a page twice in one sequence: {table}"
            for page in table:
                expected[page] += 1
        assert expected == self._counts, "holds differ from the sequences' page tables"
        free, remembered = set(self._free), set(self._remembered)
        assert len(free) == len(self._free), "a page is free twice"
        held = {page for page, count in enumerate(expected) if count}
        assert not (free & remembered or free & held or remembered & held), "a page is in two states"
        assert len(free) + len(remembered) + len(held) == self.num_pages, "a page is in no state"
        for page_hash, page in self._pages_by_hash.items():
            assert self._hashes[page] == page_hash, "a hash finds a page that is not its own"
            assert page not in free, "a free page can be found"

    def _take_back(self) -> int:
        """Hold the remembered page that was used least recently, which is found no more."""
        page, _ = self._remembered.popitem(last=False)
        page_hash = self._hashes[page]
        assert page_hash is not None, "only pages with a hash are remembered"
        del self._pages_by_hash[page_hash]
        self._hashes[page] = None
        self._counts[page] = 1
        return page
