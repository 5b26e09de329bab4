"""An event stream of OpenAI's completions or chats, read as it comes: chunks, tokens, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

TokenCounts = Literal["per chunk", "spread"]
BROKEN_FINISHES = ("abort", "error", "cancelled")


class StreamError(Exception):
    """A stream that cannot be counted, in words."""


@dataclass
class _Chunk:
    at: float
    has_choice: bool
    num_characters: int
    total: int | None
    """Output tokens so far, where the server says."""


class Stream:
    """One answer; times are the caller's.

    `done_at` is when its `[DONE]` came. StreamError from `feed` where an event tells of an error or is no JSON.
    """

    def __init__(self) -> None:
        self.done_at: float | None = None
        self.finish_reason: str | None = None
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.cached_tokens: int | None = None
        self._has_usage = False
        self._rest = b""
        self._chunks: list[_Chunk] = []

    def feed(self, data: bytes, now: float) -> None:
        """Take in what one read brought; all of it has the time of the read."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.done_at = now
            return
        try:
            event = msgspec.json.decode(data)
        except msgspec.DecodeError as error:
            raise StreamError(f"an event is not JSON ({error}): {data[:100]!r}") from None
        if not isinstance(event, dict):
            raise StreamError(f"an event is no object: {data[:100]!r}")
        if event.get("error"):
            told = event["error"]
            said = told.get("message", told) if isinstance(told, dict) else told
            raise StreamError(f"the stream brought an error: {said!s:.300}")
        total = self._usage(event.get("usage"))
        choices = event.get("choices") or []
        if choices:
            self.finish_reason = choices[0].get("finish_reason") or self.finish_reason
        size = _num_characters(choices[0]) if choices else 0
        if choices or total is not None:
            self._chunks.append(_Chunk(now, bool(choices), size, total))

    def _usage(self, usage: Any) -> int | None:
        """Output tokens so far by this event, where it says."""
        if not isinstance(usage, dict) or not isinstance(usage.get("completion_tokens"), int):
            return None
        self._has_usage = True
        self.prompt_tokens = usage.get("prompt_tokens") or self.prompt_tokens
        self.output_tokens = usage["completion_tokens"]
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
            self.cached_tokens = details["cached_tokens"]
        return self.output_tokens

    def problem(self, num_tokens: int | None) -> str:
        """Why a stream that has ended must not be counted, or ''; `num_tokens`: exactly so many were asked for."""
        if self.finish_reason is None:
            return f"the stream ended without a finish_reason after {len(self._chunks)} chunks"
        if self.finish_reason in BROKEN_FINISHES:
            return f"the stream finished with {self.finish_reason!r}"
        if self.done_at is None:
            return f"the stream ended without [DONE] after {len(self._chunks)} chunks"
        if not self._has_usage:
            return "the server sent no usage, so its tokens cannot be counted"
        if self.output_tokens < 1:
            return "the answer has no token"
        if num_tokens is not None and self.output_tokens != num_tokens:
            return f"{self.output_tokens} tokens came, {num_tokens} were asked for with ignore_eos"
        if len(self.tokens()[0]) != self.output_tokens:
            return f"the chunks tell of {len(self.tokens()[0])} tokens, the end of {self.output_tokens}"
        return ""

    def tokens(self) -> tuple[list[float], TokenCounts]:
        """When each token came: by the server's own count of each chunk, or else spread over the chunks with text."""
        texts = [chunk for chunk in self._chunks if chunk.num_characters]
        told = any(chunk.total for chunk in self._chunks if chunk.has_choice)
        if told and all(chunk.total is not None for chunk in texts):
            times: list[float] = []
            for chunk in self._chunks:
                times += [chunk.at] * ((chunk.total or 0) - len(times))
            return times, "per chunk"
        return _spread(texts, self.output_tokens), "spread"


def _num_characters(choice: dict[str, Any]) -> int:
    """Characters that a chunk adds; 0 for one that brings a role or an end only."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return len(choice.get("text") or "")
    return sum(len(delta.get(name) or "") for name in ("content", "reasoning_content", "reasoning"))


def _spread(chunks: list[_Chunk], num_tokens: int) -> list[float]:
    """The times of tokens, shared out: one to each chunk, the others in proportion to the chunks' characters.

    Where they are fewer than the chunks, they are the first chunks of equal shares, so that the first is the first.
    """
    if not chunks:
        return []
    if num_tokens <= len(chunks):
        return [chunks[i * len(chunks) // num_tokens].at for i in range(num_tokens)]
    characters = sum(chunk.num_characters for chunk in chunks)
    times, seen, given = list[float](), 0, 0
    for chunk in chunks:
        seen += chunk.num_characters
        more = round((num_tokens - len(chunks)) * seen / characters) - given
        given += more
        times += [chunk.at] * (1 + more)
    return times
