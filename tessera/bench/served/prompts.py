"""Prompts of exactly so many tokens as a server counts, no two alike unless that is wanted.

Where a server has `/tokenize` (ours, vLLM) the ids of common words are asked for once and prompts are drawn from them
and sent as ids: their length is exact. Elsewhere, and for chats, prompts are words, and a few requests for one token,
whose `usage.prompt_tokens` is read, find the words that are a token each and what the server adds of its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from tessera.bench.served.client import Client
from tessera.bench.served.load import Call
from tessera.bench.served.servers import Server
from tessera.bench.served.words import WORDS
from tessera.errors import TesseraError

FEWEST_WORDS = 16
"""Of fewer words, prompts would begin alike too often."""
ASK_SECONDS = 60.0


class _Tokens(msgspec.Struct):
    tokens: list[int]


@dataclass(frozen=True)
class Prompts:
    """What prompts for one server are drawn from: token ids, or words of one token each."""

    parts: Sequence[int] | Sequence[str]
    num_added: int = 0
    """Tokens that the server adds to a prompt of words: a first token, a chat template."""
    messages: bool = False
    """Prompts are for the chat endpoint."""

    def draw(self, num_tokens: int, *salt: object) -> str | list[int]:
        """A prompt of `num_tokens`, the same for the same salt; TesseraError where the server adds as many itself."""
        number = num_tokens - self.num_added
        if number < 1:
            raise TesseraError(
                f"a prompt of {num_tokens} tokens cannot be made: the server adds {self.num_added} of its own",
                f"use --input-lens {self.num_added + 1} or more",
            )
        source = random.Random(repr((num_tokens, salt)))  # no prompt begins as one of another length does
        drawn = [source.choice(self.parts) for _ in range(number)]
        return [part for part in drawn if isinstance(part, int)] or " ".join(map(str, drawn))

    def call(self, index: int, num_tokens: int, max_tokens: int, fields: dict[str, Any], *salt: object) -> Call:
        """A request with such a prompt."""
        prompt = self.draw(num_tokens, *salt)
        return Call(index, prompt, max_tokens, messages=self.messages, fields=fields)


async def prompts_for(server: Server, model: str, *, messages: bool = False) -> Prompts:
    """What to draw prompts for `server` from; TesseraError where it cannot be found out."""
    if not messages and (ids := await _token_ids(server, model)):
        return Prompts(ids)
    return await _words(server, model, messages)


async def _token_ids(server: Server, model: str) -> list[int]:
    """Ids of common words, by the server's own tokenizer; [] where it has no such route."""
    body = {"model": model, "prompt": " ".join(["", *WORDS]), "add_special_tokens": False}
    timeout = aiohttp.ClientTimeout(total=ASK_SECONDS)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=server.headers) as session,
            session.post(server.url.removesuffix("/v1") + "/tokenize", json=body) as response,
        ):
            raw = await response.read()
            ids = msgspec.json.decode(raw, type=_Tokens).tokens if response.status == 200 else []
    except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError):
        return []
    ids = list(dict.fromkeys(ids))
    return ids if len(ids) >= FEWEST_WORDS else []


async def _words(server: Server, model: str, messages: bool) -> Prompts:
    async def count(words: Sequence[str]) -> int:
        call = Call(0, " ".join(words), 1, messages=messages)
        client = Client(server.url, model, timeout_s=ASK_SECONDS, headers=server.headers, dialect=server.dialect)
        reply = (await client.closed_loop([call], 1)).replies[0]
        if not reply.ok:
            raise TesseraError(f"{server.url} did not count a prompt's tokens: {reply.error}", "see the server's log")
        return reply.prompt_tokens

    first = WORDS[0]
    added = 2 * await count([first]) - await count([first, first])

    async def single(words: Sequence[str]) -> list[str]:
        """Those of `words` that are one token each: all, or what is found in either half."""
        if await count([first, *words]) - added - 1 == len(words):
            return list(words)
        half = len(words) // 2
        return [] if not half else [*await single(words[:half]), *await single(words[half:])]

    found = await single(WORDS)
    if len(found) < FEWEST_WORDS or await count(found) != added + len(found):
        raise TesseraError(
            f"{server.url} counts so that only {len(found)} of {len(WORDS)} common words are one token each",
            "measure a server that has /tokenize, without --chat",
        )
    return Prompts(found, added, messages)
