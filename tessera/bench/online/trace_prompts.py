"""The prompts of a trace: its own, or random tokens, alike where the trace says so and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tessera.bench.online.trace import Trace
from tessera.bench.served.load import Call
from tessera.bench.served.words import WORDS

PLAIN_IDS = range(1000, 30000)
"""Ids that are ordinary tokens in every vocabulary of 30,000 or more that is in wide use: special ones lie outside."""
NUM_MARK_WORDS = 4
"""Before a text that is sent in several replays, so that no two begin alike."""


@dataclass(frozen=True)
class Vocabulary:
    """What random prompts are drawn from: token ids that are no special tokens, or words."""

    token_ids: Sequence[int] = ()
    """Empty: prompts are texts of as many words as the trace has tokens, for servers that take no ids."""

    @property
    def is_text(self) -> bool:
        """Whether prompts are texts."""
        return not self.token_ids


def calls_of(
    trace: Trace, vocabulary: Vocabulary, *, scale: float, salt: Sequence[int], messages: bool = False
) -> list[Call]:
    """The calls of one replay; gaps between arrivals are those of the trace times `scale`, so 0.4 is a heavier load.

    Equal `hash_ids` give equal blocks; another `salt` gives other blocks throughout, so that no replay finds what
    an earlier one left in a prefix cache. Prompts that the trace brings are sent as they are, but for their beginning:
    the first token is another one in each replay (before a text stand NUM_MARK_WORDS words more), the same in all of
    them. Every call asks for exactly the output length, greedily.
    """
    if trace.prompts:
        return _known_calls(trace, vocabulary, scale, salt, messages)
    blocks: dict[int, list[int] | list[str]] = {}
    calls = []
    for index, arrival in enumerate(trace.arrivals):
        parts: list[int | str] = []
        for hash_id in arrival.hash_ids:
            if hash_id not in blocks:
                blocks[hash_id] = _block(trace.block_tokens, vocabulary, (*salt, 1, hash_id))
            parts += blocks[hash_id]
        parts = parts[: arrival.input_tokens]
        calls.append(_call(index, parts, arrival.output_tokens, scale * arrival.at_s, messages))
    return calls


def warmup_calls(
    trace: Trace, vocabulary: Vocabulary, number: int, *, salt: Sequence[int], messages: bool = False
) -> list[Call]:
    """Calls as long as the trace's first `number` (from the start again where it has fewer), of tokens of their own."""
    calls = []
    for index in range(number):
        arrival = trace.arrivals[index % len(trace.arrivals)]
        block = _block(arrival.input_tokens, vocabulary, (*salt, 2, index))
        calls.append(_call(index, block, arrival.output_tokens, 0.0, messages))
    return calls


def _known_calls(trace: Trace, vocabulary: Vocabulary, scale: float, salt: Sequence[int], messages: bool) -> list[Call]:
    """The calls of a trace that brings its prompts."""
    mark = _block(NUM_MARK_WORDS if vocabulary.is_text else 1, vocabulary, (*salt, 3))
    calls = []
    for index, (arrival, prompt) in enumerate(zip(trace.arrivals, trace.prompts, strict=True)):
        parts = [*mark, prompt.text] if vocabulary.is_text else [*mark, *prompt.token_ids[1:]]
        calls.append(_call(index, parts, arrival.output_tokens, scale * arrival.at_s, messages))
    return calls


def _call(index: int, parts: Sequence[int | str], max_tokens: int, at_s: float, messages: bool) -> Call:
    ids = [part for part in parts if isinstance(part, int)]
    prompt = ids or " ".join(str(part) for part in parts)
    fields = {"temperature": 0, "ignore_eos": True, "seed": index}
    return Call(index, prompt, max_tokens, at_s, messages=messages, fields=fields)


def _block(length: int, vocabulary: Vocabulary, seed: Sequence[int]) -> list[int] | list[str]:
    import numpy as np

    # a hash id may have 64 bits; a seed's words are read as 32 bits each, so that none collides with another
    random = np.random.default_rng([half for word in seed for half in (word & 0xFFFFFFFF, word >> 32 & 0xFFFFFFFF)])
    if vocabulary.is_text:
        return [WORDS[i] for i in random.integers(0, len(WORDS), length)]
    return [vocabulary.token_ids[i] for i in random.integers(0, len(vocabulary.token_ids), length)]
