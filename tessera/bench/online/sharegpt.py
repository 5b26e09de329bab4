"""Conversations in ShareGPT's format as a trace: what people asked, and how long the answers were.

A file is a JSON array of `{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}`.
Conversations have no times: requests arrive at random, as those of `poisson`. Which are taken follows the sampler of
vLLM's benchmarks (vllm/benchmarks/datasets.py, `is_valid_sequence`): in an order shuffled by the seed, the first whose
prompt and answer have 4 tokens or more each, whose prompt has 1024 at most, and which have 2048 at most together.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tessera.bench.online.trace import Prompt, Trace, poisson
from tessera.errors import ConfigError
from tessera.log import logger

BLOCK_TOKENS = 16
"""Of what prompts are said to share: a page of most caches."""
PIECE_CHARACTERS = 2**20
HUMAN, MODEL = ("human", "user"), ("gpt", "chatgpt", "bing", "bard", "assistant")
"""Who speaks, as the files in use name them."""


@dataclass(frozen=True)
class Limits:
    """Which conversations are taken."""

    shortest: int = 4
    """Tokens of a prompt and of an answer."""
    longest_prompt: int = 1024
    longest: int = 2048
    """Tokens of both together."""
    longest_answer: int | None = None
    """Answers that are longer are cut off here, before their length counts."""

    def output_tokens(self, prompt: int, answer: int) -> int | None:
        """How many tokens to ask for; None where the conversation is left out."""
        asked = min(answer, self.longest_answer or answer)
        fits = min(prompt, answer) >= self.shortest and prompt <= self.longest_prompt
        return asked if fits and prompt + asked <= self.longest else None


def is_sharegpt(path: Path) -> bool:
    """Whether a file begins as a JSON array does; traces have an object a line."""
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def read_sharegpt(
    path: Path,
    encode: Callable[[str], list[int]],
    *,
    number: int,
    rate: float,
    seed: int,
    limits: Limits = Limits(),
) -> Trace:
    """`number` requests from a file, at `rate` a second; `encode` makes token ids of a text.

    A file that is cut short is read as far as it goes, with a warning. ConfigError where it is no JSON array of
    conversations or has too few that are taken.
    """
    turns = list(_turns(path))
    if not turns:
        raise ConfigError(f"{path} has no conversation in which a human asks and a model answers", "name another file")
    random.Random(seed).shuffle(turns)
    taken: list[tuple[Prompt, int]] = []
    for asked, answered in turns:
        if len(taken) == number:
            break
        token_ids = tuple(encode(asked))
        output_tokens = limits.output_tokens(len(token_ids), len(encode(answered)))
        if output_tokens is not None:
            taken.append((Prompt(asked, token_ids), output_tokens))
    if len(taken) < number:
        raise ConfigError(
            f"{path} has {len(taken)} conversations of {limits.shortest} to {limits.longest} tokens, "
            f"{number} are asked for",
            f"use --num-requests {max(1, len(taken))}" if taken else "name another file",
        )
    times = poisson(rate=rate, number=number, input_len="1", output_len="1", seed=seed).arrivals
    numbers: dict[tuple[int, ...], int] = {}
    arrivals = [
        replace(
            each,
            input_tokens=len(prompt.token_ids),
            output_tokens=output_tokens,
            hash_ids=_hash_ids(prompt.token_ids, numbers),
        )
        for each, (prompt, output_tokens) in zip(times, taken, strict=True)
    ]
    return Trace(path.name, arrivals, BLOCK_TOKENS, [prompt for prompt, _ in taken])


def _hash_ids(token_ids: tuple[int, ...], numbers: dict[tuple[int, ...], int]) -> tuple[int, ...]:
    """Of its blocks; equal ones have equal ids, in all prompts."""
    blocks = (token_ids[at : at + BLOCK_TOKENS] for at in range(0, len(token_ids), BLOCK_TOKENS))
    return tuple(numbers.setdefault(block, len(numbers)) for block in blocks)


def _turns(path: Path) -> Iterator[tuple[str, str]]:
    """What a human asked first and a model answered to that, of each conversation that has both."""
    for entry in _objects(path):
        said = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(said, list):
            raise ConfigError(f"{path} has an entry without `conversations`: {str(entry)[:80]}", "name a ShareGPT file")
        turns = [turn for turn in said if isinstance(turn, dict) and isinstance(turn.get("value"), str)]
        at = next((i for i, turn in enumerate(turns) if turn.get("from") in HUMAN), len(turns))
        if at + 1 < len(turns) and turns[at + 1].get("from") in MODEL:
            yield turns[at]["value"], turns[at + 1]["value"]


def _objects(path: Path) -> Iterator[Any]:
    """The elements of a JSON array, one after another; one that the file's end cuts off is left out, with a warning."""
    decoder, number, text, at = json.JSONDecoder(), 0, "", 0
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        ended = False
        while True:
            text, at = text[at:].lstrip(" \t\r\n,[" if not number else " \t\r\n,"), 0
            if text.startswith("]"):
                return
            try:
                found, at = decoder.raw_decode(text)
            except json.JSONDecodeError as error:
                if not _may_go_on(error, text):
                    place = f"{path}, element {number + 1} of its array"
                    raise ConfigError(f"{place}, is no JSON: {error.msg}", "mend the file") from None
                if ended:
                    logger.warning("%s is cut off after %d conversations: they are taken", path, number)
                    return
                piece = file.read(PIECE_CHARACTERS)
                text, ended = text + piece, not piece
                continue
            number += 1
            yield found


def _may_go_on(error: json.JSONDecodeError, text: str) -> bool:
    """Whether text is no JSON only because it ends too early."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - 8
