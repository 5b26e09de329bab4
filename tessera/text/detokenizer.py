"""Token ids to text, as they come, never half a character.

What comes out, joined, is what `Tokenizer.decode` makes of all the ids at once. One exception is meant: the space
that SentencePiece drops at the start of a text stays where the output continues a prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from codecs import utf_8_decode
from collections.abc import Sequence
from itertools import islice

from tessera.text.pieces import Spelling
from tessera.text.tokenizer import Tokenizer

WINDOW_TOKENS = 4
MAX_OPEN_TOKENS = 8
"""More tokens than any character has bytes, so that nonsense does not hold text back for ever."""


class Detokenizer(ABC):
    """The text of one sequence so far; each token costs the same, however long the text is.

    The text does not depend on how many tokens are fed at a time.
    """

    num_open = 0
    """Tokens at the end so far whose text, if they have any, has not come out to its end."""

    @abstractmethod
    def feed(self, token_ids: Sequence[int]) -> str:
        """The whole characters that these tokens complete."""

    @abstractmethod
    def flush(self) -> str:
        """What is left at the end of the sequence: U+FFFD for a character that was never completed."""


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
    """Tokens are bytes, and those of several are joined before UTF-8 is decoded: many cost little more than one."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._piece_of = tokenizer.piece_table(skip_special_tokens=skip_special_tokens).__getitem__
        self._rest = b""
        """A character that has begun."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The whole characters that these tokens complete."""
        data = b"".join(map(self._piece_of, token_ids))
        if self._rest:
            data = self._rest + data
        text, num_used = utf_8_decode(data, "replace", False)
        self._rest = data[num_used:]
        if not text:
            self.num_open += len(token_ids)
        elif self._rest or not self._piece_of(token_ids[-1]):
            # Where the rest cut a character off, its first token gave out U+FFFD for that one: none before it is open.
            cut_off = bool(self._rest) and utf_8_decode(data[:num_used], "replace", False)[1] < num_used
            self.num_open = self._count_open(token_ids, cut_off)
        else:
            self.num_open = 0
        return text

    def flush(self) -> str:
        """U+FFFD for a character that was begun and not completed."""
        rest, self._rest = self._rest, b""
        return rest.decode("utf-8", "replace")

    def _count_open(self, token_ids: Sequence[int], cut_off: bool) -> int:
        """How many at the end have no byte before the rest, which lies within them once text has come out.

        cut_off  none before the rest's first
        """
        count, num_bytes = 0, len(self._rest)
        for token_id in reversed(token_ids):
            num_bytes -= len(self._piece_of(token_id))
            if num_bytes < 0:
                break
            count += 1
            if cut_off and num_bytes == 0:
                break
        return count


class TokenwiseDetokenizer(Detokenizer):
    """What a token adds depends on those before it, so each is looked at."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()

    def feed(self, token_ids: Sequence[int]) -> str:
        """The whole characters that these tokens complete."""
        texts = []
        for token_id in token_ids:
            text = "" if token_id in self._skipped else self._add(token_id)
            self.num_open = 0 if text else self.num_open + 1
            texts.append(text)
        return "".join(texts)

    @abstractmethod
    def _add(self, token_id: int) -> str:
        """The whole characters that one token, which is not skipped, completes."""


class ByteFallbackDetokenizer(TokenwiseDetokenizer):
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


class WindowDetokenizer(TokenwiseDetokenizer):
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
