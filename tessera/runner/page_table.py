"""The page numbers of a step's sequences as one array, of which a step changes little."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tessera.runner.rows import rows_among
from tessera.types import Sequence

_MORE_PAGES = 8
"""Room for those that come next, or the longest sequence would have all rows arranged anew with each of its pages."""


class PageTable:
    """Remembers the step before: a decoding sequence gets a new page once in `page_size` steps.

    A sequence is known by the list that its pages are in: one that was preempted has a new list.

    version  another number after every call that has changed an entry or a row's place: who has copied the table has
             to do so again
    """

    def __init__(self) -> None:
        self.version = 0
        self._sequences: list[Sequence] = []
        self._lists: list[list[int]] = []
        self._counts: NDArray[np.int64] = np.zeros(0, np.int64)
        self._table: NDArray[np.int32] = np.zeros((0, 0), np.int32)
        self._width = 0

    def of(self, sequences: list[Sequence], counts: NDArray[np.int64]) -> NDArray[np.int32]:
        """[sequences, most pages or more] int32, zero where a sequence has no page; overwritten by the next call.

        counts  [sequences] pages to read of each; where the list of sequences is the very one of the call before,
                only those are looked at that have more than then
        """
        if sequences is not self._sequences:
            self._arrange([sequence.pages for sequence in sequences], int(counts.max()))
            self._sequences = sequences
        elif counts.max() > self._table.shape[1]:
            self._arrange(self._lists, int(counts.max()))
        more = counts > self._counts
        if more.any():
            for row in more.nonzero()[0].tolist():
                first, last = int(self._counts[row]), int(counts[row])
                self._table[row, first:last] = self._lists[row][first:last]
            self._counts = np.maximum(counts, self._counts)
            self._changed()
        return self._table[:, : self._width]

    def _arrange(self, lists: list[list[int]], most_pages: int) -> None:
        """Rows in the order of these lists; those that were not in the step before hold no page yet."""
        before = rows_among(map(id, lists), map(id, self._lists))  # held, or another could have the same id
        kept = before >= 0
        width = min(self._table.shape[1], 2 * most_pages)
        if width < most_pages:
            width = most_pages + _MORE_PAGES
        table, counts = np.zeros((len(lists), width), np.int32), np.zeros(len(lists), np.int64)
        shared = min(width, self._table.shape[1])
        table[kept, :shared] = self._table[before[kept], :shared]
        counts[kept] = np.minimum(self._counts[before[kept]], shared)
        self._table, self._counts, self._lists = table, counts, lists
        self._changed()

    def _changed(self) -> None:
        self.version += 1
        self._width = int(self._counts.max())
