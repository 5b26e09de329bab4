"""The running sequences that compute one token a step, as arrays that each step moves on by one."""

from __future__ import annotations

from collections.abc import Container
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from tessera.step import Step
from tessera.types import Sequence


class Decodes:
    """Sequences whose next token was sampled in the last step that began; the longest first.

    A device starts programs in the order of rows, and a long sequence that was begun last would keep all others
    waiting. As each has one token more a step, the order lasts. The list stays the same object until a sequence joins
    or leaves.
    """

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self._computed: NDArray[np.int64] = np.zeros(0, np.int64)
        self._most: NDArray[np.int64] = np.zeros(0, np.int64)

    def join(self, sequences: list[Sequence]) -> None:
        """Take in sequences that have been computed to their last known token."""
        if not sequences:
            return
        together = self.sequences + sequences
        computed = np.append(self._computed, [s.num_computed_tokens for s in sequences])
        order = np.argsort(-computed, kind="stable")
        self.sequences = [together[row] for row in order.tolist()]
        self._computed = computed[order]
        self._most = np.append(self._most, [s.most_tokens for s in sequences])[order]

    def remove(self, gone: Container[Sequence]) -> None:
        """Leave out sequences; those that are not here are no error."""
        self._keep(np.fromiter((s not in gone for s in self.sequences), np.bool_, len(self.sequences)))

    def remove_full(self) -> None:
        """Leave out those that may have no token after the one that is sampled or pending."""
        self._keep(self._computed + 1 < self._most)

    def at_page_end(self, page_size: int) -> list[Sequence]:
        """Those whose next token is the first of a page."""
        return [self.sequences[row] for row in np.nonzero(self._computed % page_size == 0)[0].tolist()]

    def step(self) -> Step:
        """A step of one token of each."""
        count = len(self.sequences)
        pending = np.full(count, count > 0 and self.sequences[0].num_pending > 0)  # of one step: of all or of none
        every = np.ones(count, np.bool_)
        return Step(
            self.sequences,
            np.ones(count, np.int64),
            self._computed + 1,
            every,
            pending,
            self.sequences,
            owed_logprobs=[],
        )

    def move_on(self) -> None:
        """Take note that the step has begun."""
        self._computed = self._computed + 1

    def check(self) -> None:
        """Raise AssertionError where the arrays and the sequences contradict one another."""
        assert self._computed.tolist() == [s.num_computed_tokens for s in self.sequences]
        assert all(s.num_computed_tokens + 1 == s.num_tokens for s in self.sequences)
        assert len({s.num_pending for s in self.sequences}) <= 1

    def _keep(self, stays: NDArray[np.bool_]) -> None:
        if not stays.all():
            self.sequences = list(compress(self.sequences, stays.tolist()))
            self._computed, self._most = self._computed[stays], self._most[stays]
