"""The running sequences that compute one token a step, as arrays that each step moves on by one."""

from __future__ import annotations

from collections.abc import Container
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from tessera.step import Step
from tessera.types import Sequence

_NEVER = 2**62


class Decodes:
    """Sequences whose next token was sampled in the last step that began; the longest first.

    A device starts programs in the order of rows, and a long sequence that was begun last would keep all others
    waiting. As each has one token more a step, the order lasts. The list stays the same object until a sequence joins
    or leaves. How many steps pass before something happens to one of them is known, and until then none is looked at.
    """

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self._computed: NDArray[np.int64] = np.zeros(0, np.int64)
        self._most: NDArray[np.int64] = np.zeros(0, np.int64)
        self._steps_to_full = self._steps_to_page_end = 0
        self._is_new = True
        """Whether sequences came or went since `_refresh`."""
        self._refresh()

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
        self._is_new = True

    def remove(self, gone: Container[Sequence]) -> None:
        """Leave out sequences; those that are not here are no error."""
        self._keep(np.fromiter((s not in gone for s in self.sequences), np.bool_, len(self.sequences)))

    def remove_full(self) -> None:
        """Leave out those that may have no token after the one that is sampled or pending."""
        self._refresh()
        if self._steps_to_full <= 0:
            self._keep(self._computed + 1 < self._most)

    def at_page_end(self, page_size: int) -> list[Sequence]:
        """Those whose next token is the first of a page; of one `page_size`, whenever it is asked."""
        self._refresh()
        if self._steps_to_page_end > 0:
            return []
        left = -self._computed % page_size
        rows = (left == 0).nonzero()[0].tolist()
        if not rows:
            self._steps_to_page_end = int(left.min(initial=page_size))
        return [self.sequences[row] for row in rows]

    def step(self) -> Step:
        """A step of one token of each."""
        self._refresh()
        pending = bool(self.sequences) and self.sequences[0].num_pending > 0  # of one step: of all or of none
        return Step(
            self.sequences,
            self._ones,
            self._computed + 1,
            self._every,
            self._every if pending else self._none,
            self.sequences,
            owed_logprobs=[],
        )

    def move_on(self) -> None:
        """Take note that the step has begun."""
        self._computed = self._computed + 1
        self._steps_to_full -= 1
        self._steps_to_page_end -= 1

    def check(self) -> None:
        """Raise AssertionError where the arrays and the sequences contradict one another."""
        assert self._computed.tolist() == [s.num_computed_tokens for s in self.sequences]
        assert all(s.num_computed_tokens + 1 == s.num_tokens for s in self.sequences)
        assert len({s.num_pending for s in self.sequences}) <= 1

    def _keep(self, stays: NDArray[np.bool_]) -> None:
        if not stays.all():
            self.sequences = list(compress(self.sequences, stays.tolist()))
            self._computed, self._most = self._computed[stays], self._most[stays]
            self._is_new = True

    def _refresh(self) -> None:
        """Where sequences came or went, make what only they decide."""
        if not self._is_new:
            return
        self._is_new, count = False, len(self.sequences)
        self._ones, self._every, self._none = (
            np.ones(count, np.int64),
            np.ones(count, np.bool_),
            np.zeros(count, np.bool_),
        )
        self._steps_to_full = int((self._most - 1 - self._computed).min(initial=_NEVER))
        self._steps_to_page_end = 0  # not known
