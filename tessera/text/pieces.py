"""The bytes that each token stands for, so that text can be put together token by token.

Two spellings cover nearly every LLM: byte-level BPE (GPT-2's, where 256 printable characters stand for the
bytes) and SentencePiece with byte fallback (where `▁` is a space and `<0x0A>` a byte). A tokenizer whose decoder
is neither is OTHER, and only its own `decode` knows what its tokens mean side by side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import Enum
from typing import Any

import tokenizers

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>", re.ASCII)


class Spelling(Enum):
    """How the tokens of a vocabulary spell text."""

    BYTE_LEVEL = "byte-level"
    BYTE_FALLBACK = "SentencePiece with byte fallback"
    OTHER = "other"


class PieceTable(dict[int, bytes]):
    """Token id -> bytes, each spelt when it is first asked for; nothing for the `skipped` ones."""

    def __init__(self, spell: Callable[[int], bytes], skipped: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self._spell, self._skipped = spell, skipped

    def __missing__(self, token_id: int) -> bytes:
        piece = self[token_id] = b"" if token_id in self._skipped else self._spell(token_id)
        return piece


class Pieces:
    """The bytes of each token, for the vocabulary of one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._single_bytes: set[int] = set()
        steps = _decoder_steps(backend)
        self.spelling = _spelling(steps)
        self.strips_start = self.spelling is Spelling.BYTE_FALLBACK and steps[-1]["type"] == "Strip"
        """Whether decoding drops one space at the very start of a text."""
        self.table = PieceTable(self._spell)
        """The bytes that each token adds to a text; none for an id that is in no vocabulary."""

    def is_single_byte(self, token_id: int) -> bool:
        """Whether this is a byte-fallback token, one byte of a character that has no token."""
        self.table[token_id]  # whose spelling tells
        return token_id in self._single_bytes

    def _spell(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self.spelling is Spelling.BYTE_LEVEL:
            values = [BYTE_OF_CHARACTER.get(character) for character in piece]
            return piece.encode() if None in values else bytes(value for value in values if value is not None)
        if self.spelling is Spelling.BYTE_FALLBACK:
            byte = _BYTE_PIECE.fullmatch(piece)
            if byte is None:
                return piece.replace("▁", " ").encode()
            self._single_bytes.add(token_id)
            return bytes([int(byte[1], 16)])
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text.encode()


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table (openai/gpt-2, encoder.py): printable bytes are themselves, the others move up to 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()
"""Character of a byte-level token -> the byte it stands for."""


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _spelling(steps: list[dict[str, Any]]) -> Spelling:
    types = [step["type"] for step in steps]
    if types == ["ByteLevel"]:
        return Spelling.BYTE_LEVEL
    if types[:3] != ["Replace", "ByteFallback", "Fuse"]:
        return Spelling.OTHER
    space = (steps[0]["pattern"], steps[0]["content"]) == ({"String": "▁"}, " ")
    strip = steps[3:] in ([], [{"type": "Strip", "content": " ", "start": 1, "stop": 0}])
    return Spelling.BYTE_FALLBACK if space and strip else Spelling.OTHER
