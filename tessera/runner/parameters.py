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
_AHEAD = 16
"""Tokens of each row whose random numbers are made together, where rows stay from step to step."""


class SamplingRows:
    """What a step's rows are sampled by; kept from step to step, for a sequence never changes its own.

    table    [rows, 5] float64: as `parameters` gives it, without the random number
    numbers  [3, rows] uint64: seed, mixed once; tokens of the prompt; tokens from which on a row is plain
    """

    def __init__(self, sequences: Items[Sequence], table: NDArray[np.float64], numbers: NDArray[np.uint64]) -> None:
        self.sequences = sequences
        self._table, self._numbers = table, numbers
        self._random = table[:, 0] > 0
        self._all_greedy = not self._random.any()
        self._always_plain = bool((numbers[2] <= numbers[1]).all())
        self._first: NDArray[np.uint64] | None = None
        self._draws: NDArray[np.float64] = np.zeros((0, len(table)))

    @classmethod
    def of(cls, sequences: Items[Sequence]) -> SamplingRows:
        """Each row made anew."""
        table = np.array([_parameters(each) for each in sequences], np.float64).reshape(-1, 5)
        numbers = np.array([_numbers(each) for each in sequences], np.uint64).reshape(-1, 3).T.copy()
        numbers[0] = _mix64(numbers[0])
        return cls(sequences, table, numbers)

    def following(self, sequences: Items[Sequence]) -> SamplingRows:
        """The rows of the next step; only those of sequences that were not in this one are made."""
        if sequences is self.sequences:
            return self
        before = rows_among(sequences, self.sequences)
        new = np.nonzero(before < 0)[0]
        made = SamplingRows.of([sequences[row] for row in new.tolist()])
        if len(new) == len(sequences):
            return SamplingRows(sequences, made._table, made._numbers)
        table, numbers = self._table[before], self._numbers.take(before, 1)
        table[new], numbers[:, new] = made._table, made._numbers
        return SamplingRows(sequences, table, numbers)

    def parameters(self, num_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """[rows, 5] float64: what `kernels.sampling.sample` is told of each row; zeros where it is greedy.

        num_tokens  [rows] tokens that each sequence has, pending ones included
        """
        table = np.empty_like(self._table)
        self.write(table, num_tokens)
        return table

    def write(self, table: NDArray[np.float64], num_tokens: NDArray[np.int64]) -> None:
        """`parameters` into the first rows of a table, zeros into the others.

        table  [rows or more, 5] float64
        """
        count = len(self._table)
        table[:count], table[count:] = self._table, 0
        if not self._all_greedy:
            table[:count, 4] = self._drawn(num_tokens)

    def _drawn(self, num_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """[1, rows] the random number of each row, 0 where it is greedy.

        Made for the tokens that follow too once the same rows are asked for again: as a rule all go on by one.
        """
        tokens = num_tokens.view(np.uint64)
        if self._first is not None:
            ahead = tokens - self._first  # wraps around where it is behind
            number = int(ahead[0])
            if number < len(self._draws) and (ahead == number).all():
                return self._draws[number : number + 1]
        following = np.arange(1 if self._first is None else _AHEAD, dtype=np.uint64)
        mixed_seeds, prompt, _ = self._numbers
        self._first = tokens.copy()
        self._draws = _uniform(mixed_seeds, tokens - prompt + following[:, None]) * self._random
        return self._draws[:1]

    def all_plain(self, num_tokens: NDArray[np.int64]) -> bool:
        """Whether all rows' logits are sampled from as they are, and nothing but the token is asked."""
        return self._always_plain or bool((num_tokens.view(np.uint64) >= self._numbers[2]).all())


def parameters(sequences: Items[Sequence]) -> NDArray[np.float64]:
    """[sequences, 5] float64: `SamplingRows.parameters` of sequences as they stand."""
    num_tokens = np.fromiter((sequence.num_tokens for sequence in sequences), np.int64, len(sequences))
    return SamplingRows.of(sequences).parameters(num_tokens)


def is_adjusted(sequence: Sequence) -> bool:
    """Whether a row is anything but the model's own: of most it is not, and even a look at each row takes time."""
    params = sequence.params
    if params.has_penalties or params.logit_bias:
        return True
    return params.min_tokens > 0 and sequence.num_output_tokens < params.min_tokens


def is_plain(sequence: Sequence) -> bool:
    """Whether a row's logits are sampled from as they are, and nothing but the token is asked."""
    return sequence.params.logprobs is None and not is_adjusted(sequence)


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
