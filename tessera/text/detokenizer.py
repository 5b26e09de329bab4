"""Token ids to text, one token at a time, never half a character.

What comes out, joined, is what `Tokenizer.decode` makes of all the ids at once. One exception is meant: the space
that SentencePiece drops at the start of a text stays where the output continues a prompt.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import islice

from tessera.text.pieces import Spelling
from tessera.text.tokenizer import Tokenizer

WINDOW_TOKENS = 4
MAX_OPEN_TOKENS = 8
"""More tokens than any character has bytes, so that nonsense does not hold text back for ever."""


class Detokenizer(ABC):
    """The text of one sequence so far; each token costs the same, however long the text is."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()

    def feed(self, token_id: int) -> str:
        """The whole characters that this token completes."""
        return "" if token_id in self._skipped else self._add(token_id)

    @abstractmethod
    def flush(self) -> str:
        """What is left at the end of the sequence: U+FFFD for a character that was never completed."""

    @abstractmethod
    def _add(self, token_id: int) -> str: ...


def make_detokenizer(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
) -> Detokenizer:
    """The detokenizer for this tokenizer's vocabulary and for an output that continues `prompt_token_ids`."""
    spelling = tokenizer.pieces.spelling
    if spelling is Spelling.BYTE_LEVEL:
        return ByteLevelDetokenizer(tokenizer, skip_special_tokens)
    skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
    before = (token_id for token_id in reversed(prompt_token_ids) if token_id not in skipped)
    last = list(islice(before, WINDOW_TOKENS))[::-1]
    if spelling is Spelling.BYTE_FALLBACK:
        strips = tokenizer.pieces.strips_start and not last
        return ByteFallbackDetokenizer(tokenizer, skip_special_tokens, strips_start=strips)
    return WindowDetokenizer(tokenizer, skip_special_tokens, last)


class ByteLevelDetokenizer(Detokenizer):
    """Tokens are bytes: they go through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__(tokenizer, skip_special_tokens)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def flush(self) -> str:
        """U+FFFD for a character that was begun and not completed."""
        return self._decoder.decode(b"", final=True)

    def _add(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))


class ByteFallbackDetokenizer(Detokenizer):
    """Tokens are text, but for runs of single bytes.

    A run is given out when it ends: one wrong byte in it makes every byte of it U+FFFD, as in full decoding.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, *, strips_start: bool) -> None:
        super().__init__(tokenizer, skip_special_tokens)
        self._run = bytearray()
        self._strips = strips_start

    def flush(self) -> str:
        """The run of bytes that the sequence ends with."""
        return self._strip(self._end_run())

    def _add(self, token_id: int) -> str:
        piece = self._tokenizer.token_bytes(token_id)
        if self._tokenizer.pieces.is_single_byte(token_id):
            self._run += piece
            return ""
        return self._strip(self._end_run() + piece.decode())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(run)

    def _strip(self, text: str) -> str:
        if not text or not self._strips:
            return text
        self._strips = False
        return text.removeprefix(" ")


class WindowDetokenizer(Detokenizer):
    """For any other decoder: what a token adds is how decoding grows by it, seen over the last few tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, before: list[int]) -> None:
        super().__init__(tokenizer, skip_special_tokens)
        self._context = before
        self._new: list[int] = []

    def flush(self) -> str:
        """The text of the tokens that are still open."""
        return self._grown()

    def _add(self, token_id: int) -> str:
        self._new.append(token_id)
        text = self._grown()
        unfinished = not text or text.endswith("\N{REPLACEMENT CHARACTER}")
        if unfinished and len(self._new) < MAX_OPEN_TOKENS:
            return ""
        self._context = (self._context + self._new)[-WINDOW_TOKENS:]
        self._new = []
        return text

    def _grown(self) -> str:
        decode = self._tokenizer.decode
        before = decode(self._context, skip_special_tokens=False)
        after = decode(self._context + self._new, skip_special_tokens=False)
        return after[len(before) :]
