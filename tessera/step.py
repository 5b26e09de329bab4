"""A step: what one forward pass computes of which sequences, as arrays, and what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tessera.types import Sequence, TokenLogprobs


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One forward pass: how many tokens of which sequence, decodes (one token) first.

    Made of the sequences as they stand, and true from then on however they change: the last `q_lens` of the first
    `kv_lens` tokens of each are computed; where that reaches the last known or pending token, the sequence's next token
    is sampled. A scheduler's steps of the same sequences, one token each, have the very same list of them, so that who
    keeps something a sequence knows by a look that nothing has changed.
    """

    sequences: list[Sequence]
    q_lens: NDArray[np.int64]
    """[sequences] tokens that are new."""
    kv_lens: NDArray[np.int64]
    """[sequences] tokens that are in the cache afterwards."""
    samples: NDArray[np.bool_]
    """[sequences] whether the next token is sampled."""
    pending: NDArray[np.bool_]
    """[sequences] whether the last of the new tokens is pending; all others are known."""
    sampling: list[Sequence]
    """Those whose next token is sampled, in the order of `sequences`; where all are, that very list."""
    owed_logprobs: list[Sequence]
    """Those whose prompt is still owed logprobs."""

    @classmethod
    def of(cls, num_tokens: Mapping[Sequence, int]) -> Step:
        """So many tokens of each sequence."""
        sequences, count = list(num_tokens), len(num_tokens)
        q_lens = np.fromiter(num_tokens.values(), np.int64, count)
        kv_lens = q_lens + np.fromiter((s.num_computed_tokens for s in sequences), np.int64, count)
        samples = kv_lens == np.fromiter((s.num_tokens for s in sequences), np.int64, count)
        sampling = sequences if samples.all() else [s for s, sampled in zip(sequences, samples) if sampled]
        pending = samples & np.fromiter((s.num_pending > 0 for s in sequences), np.bool_, count)
        owed = [s for s in sequences if s.wants_prompt_logprobs]
        return cls(sequences, q_lens, kv_lens, samples, pending, sampling, owed)

    def followed_by(self, other: Step) -> Step:
        """Both steps in one."""
        return Step(
            self.sequences + other.sequences,
            np.concatenate([self.q_lens, other.q_lens]),
            np.concatenate([self.kv_lens, other.kv_lens]),
            np.concatenate([self.samples, other.samples]),
            np.concatenate([self.pending, other.pending]),
            self.sampling + other.sampling,
            self.owed_logprobs + other.owed_logprobs,
        )

    @property
    def num_tokens(self) -> dict[Sequence, int]:
        """New tokens of each sequence; made anew each time."""
        return dict(zip(self.sequences, self.q_lens.tolist()))

    @property
    def starts(self) -> dict[Sequence, int]:
        """Tokens that each sequence had in the cache already; made anew each time."""
        return dict(zip(self.sequences, (self.kv_lens - self.q_lens).tolist()))


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step found: the sampled tokens, and logprobs where a sequence asked for them."""

    token_ids: list[int]
    """One for each of `Step.sampling`."""
    logprobs: dict[Sequence, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[Sequence, list[TokenLogprobs]] = field(default_factory=dict)
    """Of the prompt tokens that follow those computed in this step."""
