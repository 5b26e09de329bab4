"""How the rows of a step are sampled, as arrays, and the random number of each.

The random number of a token is a hash of (seed, number of the token), not the state of a generator.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from tessera.runner.rows import rows_among
from tessera.types import Sequence

_NEVER = 2**62


class SamplingRows:
    """What a step's rows are sampled by; made once for a list of sequences and kept while it is the same."""

    def __init__(self, sequences: Items[Sequence]) -> None:
        """Sequences that come and go change one row each: see `following`."""
        self.sequences = sequences
        self._table = np.array([_parameters(each) for each in sequences], np.float64).reshape(-1, 5)
        self._numbers = np.array([_numbers(each) for each in sequences], np.uint64).reshape(-1, 3).T.copy()
        self._numbers[0] = _mix64(self._numbers[0])
        self._look()

    def following(self, sequences: Items[Sequence]) -> SamplingRows:
        """The rows of the next step; what is known of a sequence is kept."""
        if sequences is self.sequences:
            return self
        known = rows_among(sequences, self.sequences)
        new = np.nonzero(known < 0)[0]
        fresh = SamplingRows([sequences[row] for row in new.tolist()])
        if len(new) == len(sequences):
            fresh.sequences = sequences
            return fresh
        rows = object.__new__(SamplingRows)
        rows.sequences = sequences
        rows._table, rows._numbers = self._table[known], self._numbers[:, known]
        rows._table[new], rows._numbers[:, new] = fresh._table, fresh._numbers
        rows._look()
        return rows

    def parameters(self, num_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """[rows, 5] float64: what `kernels.sampling.sample` is told of each row; zeros where it is greedy.

        num_tokens  [rows] tokens that each sequence has, pending ones included
        """
        table = self._table.copy()
        positions = num_tokens.view(np.uint64) - self._num_prompt_tokens
        np.copyto(table[:, 4], _uniform(self._mixed_seeds, positions), where=self._random)
        return table

    def all_plain(self, num_tokens: NDArray[np.int64]) -> bool:
        """Whether all rows' logits are sampled from as they are, and nothing but the token is asked."""
        return bool((num_tokens.view(np.uint64) >= self._plain_from).all())

    def _look(self) -> None:
        self._mixed_seeds, self._num_prompt_tokens, self._plain_from = self._numbers
        self._random = self._table[:, 0] > 0
        self.all_greedy = not self._random.any()


def parameters(sequences: Items[Sequence]) -> NDArray[np.float64]:
    """[sequences, 5] float64: `SamplingRows.parameters` of sequences as they stand."""
    num_tokens = np.fromiter((sequence.num_tokens for sequence in sequences), np.int64, len(sequences))
    return SamplingRows(sequences).parameters(num_tokens)


def is_adjusted(sequence: Sequence) -> bool:
    """Whether a row is anything but the model's own: of most it is not, and even a look at each row takes time."""
    params = sequence.params
    return bool(params.has_penalties or params.logit_bias) or 0 < params.min_tokens > sequence.num_output_tokens


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) that depend on seed and position alone: two rounds of SplitMix64's mixer.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014. Multiples of 2^-32.
    """
    return _uniform(_mix64(seeds), positions)


def _uniform(mixed_seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (_mix64(mixed_seeds + positions * _GOLDEN) >> _HALF).astype(np.float64) * 2.0**-32


_GOLDEN, _FIRST, _SECOND = (np.uint64(each) for each in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_27, _30, _31, _HALF = (np.uint64(each) for each in (27, 30, 31, 32))


def _mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[rows] uint64; sums and products wrap around."""
    values = values + _GOLDEN
    values = (values ^ (values >> _30)) * _FIRST
    values = (values ^ (values >> _27)) * _SECOND
    return values ^ (values >> _31)


def _parameters(sequence: Sequence) -> tuple[float, ...]:
    """A row of the table; the random number stands last, when it is known."""
    params = sequence.params
    return (0, 0, 0, 0, 0) if params.greedy else (params.temperature, params.top_k, params.top_p, params.min_p, 0)


def _numbers(sequence: Sequence) -> tuple[int, int, int]:
    """Its seed, the tokens of its prompt, and the tokens from which on nothing but sampling is asked of it."""
    params, prompt = sequence.params, sequence.num_prompt_tokens
    never = params.logprobs is not None or params.has_penalties or params.logit_bias
    return sequence.seed, prompt, _NEVER if never else prompt + params.min_tokens
