"""A trace: when requests arrive, how long they are, and which parts of their prompts are alike."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tessera.errors import ConfigError

BLOCK_TOKENS = 512
"""Of Mooncake's traces, and of those made here."""


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    """From the trace's first request."""
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]
    """One for each block of the prompt, the last of which may be shorter: equal ids mean equal tokens."""


@dataclass(frozen=True)
class Prompt:
    """What somebody wrote."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival."""

    name: str
    arrivals: Sequence[Arrival]
    block_tokens: int = BLOCK_TOKENS
    prompts: Sequence[Prompt] = ()
    """Of each request, where they are known; where they are not, they are made at random, as long as was noted."""

    @property
    def longest(self) -> int:
        """Tokens of the longest request, its answer included."""
        return max(each.input_tokens + each.output_tokens for each in self.arrivals)

    @cached_property
    def digest(self) -> str:
        """Eight characters that differ where the requests do."""
        lines = "\n".join(f"{each}" for each in [*self.arrivals, *self.prompts])
        return hashlib.sha256(f"{self.block_tokens}\n{lines}".encode()).hexdigest()[:8]

    @cached_property
    def shared_share(self) -> float:
        """Of all prompt tokens, those that begin a prompt as an earlier one began: what a prefix cache can save.

        Beginnings are numbered as nodes of a trie, so that each block is looked at once.
        """
        nodes, shared = dict[tuple[int, int], int](), 0
        for each in self.arrivals:
            at, num_known, known = 0, 0, True
            for block in each.hash_ids:
                known = known and (at, block) in nodes
                num_known += known
                at = nodes.setdefault((at, block), len(nodes) + 1)
            shared += min(num_known * self.block_tokens, each.input_tokens)
        return shared / sum(each.input_tokens for each in self.arrivals)

    def first(self, number: int) -> Trace:
        """The same, cut off after so many requests; ConfigError where it has fewer."""
        if number > len(self.arrivals):
            raise ConfigError(
                f"the trace {self.name} has {len(self.arrivals)} requests, --num-requests asks for {number}",
                "ask for fewer, or leave --num-requests out",
            )
        return Trace(self.name, self.arrivals[:number], self.block_tokens, self.prompts[:number])


def poisson(*, rate: float, number: int, input_len: str, output_len: str, seed: int) -> Trace:
    """`number` requests whose gaps are exponential with mean 1 / `rate` seconds; no two prompts share a block.

    Lengths are a number or a range `LOW..HIGH`, then uniform; ConfigError for others.
    """
    import numpy as np

    random = np.random.default_rng([seed, 0])
    at = np.cumsum(random.exponential(1 / rate, number))
    inputs = _lengths("--input-len", input_len, number, random)
    outputs = _lengths("--output-len", output_len, number, random)
    arrivals, next_id = [], 0
    for i in range(number):
        num_blocks = -(-inputs[i] // BLOCK_TOKENS)
        ids = tuple(range(next_id, next_id + num_blocks))
        arrivals.append(Arrival(float(at[i] - at[0]), inputs[i], outputs[i], ids))
        next_id += num_blocks
    return Trace("poisson", arrivals)


def length_range(flag: str, text: str) -> tuple[int, int]:
    """`256` -> (256, 256), `100..500` -> (100, 500); ConfigError, naming the flag, for anything else."""
    found = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", text.strip())
    if not found:
        raise ConfigError(f"{flag} {text!r} is neither a number of tokens nor a range", f"use {flag} 256 or 100..500")
    low, high = int(found[1]), int(found[2] or found[1])
    if not 1 <= low <= high:
        raise ConfigError(f"{flag} {text!r} must begin with 1 or more and not end below that", f"use {flag} 100..500")
    return low, high


def _lengths(flag: str, text: str, number: int, random: object) -> list[int]:
    import numpy as np

    assert isinstance(random, np.random.Generator)
    low, high = length_range(flag, text)
    return [int(length) for length in random.integers(low, high, number, endpoint=True)]
