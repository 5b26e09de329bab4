"""The page numbers of a step's sequences as one array, of which a step changes little."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from tessera.types import Sequence


class PageTable:
    """Remembers the step before: a decoding sequence gets a new page once in `page_size` steps.

    A sequence is known by the list that its pages are in: one that was preempted has a new list.
    """

    def __init__(self) -> None:
        self._lists: list[list[int]] = []
        self._ids: list[int] = []
        self._counts: NDArray[np.int64] = np.zeros(0, np.int64)
        self._table: NDArray[np.int32] = np.zeros((0, 0), np.int32)

    def of(self, sequences: Items[Sequence]) -> NDArray[np.int32]:
        """[sequences, most pages or more] int32, zero where a sequence has no page; overwritten by the next call."""
        lists = [sequence.pages for sequence in sequences]
        counts = np.fromiter(map(len, lists), np.int64, len(lists))
        if (ids := list(map(id, lists))) != self._ids or counts.max() > self._table.shape[1]:
            self._arrange(ids, int(counts.max()))
            self._lists, self._ids = lists, ids  # held, or another list could have the same id
        for row in np.nonzero(counts != self._counts)[0].tolist():
            first, last = int(self._counts[row]), int(counts[row])
            self._table[row, first:last] = lists[row][first:last]
        self._counts = counts
        return self._table

    def _arrange(self, ids: list[int], most_pages: int) -> None:
        """Rows in the order of these lists; those that were not in the step before hold no page yet."""
        rows = {each: row for row, each in enumerate(self._ids)}
        before = np.fromiter((rows.get(each, -1) for each in ids), np.int64, len(ids))
        kept = before >= 0
        width = max(1, most_pages, min(self._table.shape[1], 2 * most_pages))
        table, counts = np.zeros((len(ids), width), np.int32), np.zeros(len(ids), np.int64)
        shared = min(width, self._table.shape[1])
        table[kept, :shared] = self._table[before[kept], :shared]
        counts[kept] = self._counts[before[kept]]
        self._table, self._counts = table, counts
