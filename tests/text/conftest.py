"""Tokenizers that the tests of the text layer share."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest

from tessera.config import ModelConfig
from tessera.model.source import find_model
from tessera.text.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, gguf_parts
from tessera.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def smollm() -> Tokenizer:
    """The default model's tokenizer, out of its GGUF file: byte-level BPE."""
    config = ModelConfig()
    return load_tokenizer(find_model(config), config)


@pytest.fixture(scope="session")
def sentence_piece_metadata() -> dict[str, Any]:
    """A hand-made SentencePiece vocabulary as GGUF holds it: letters, a few words, and all bytes."""
    words = ["▁h", "el", "lo", "▁hel", "▁hello", "▁w", "▁wo", "rl", "rld", "▁world", "▁▁", "中"]
    letters = ["▁", *string.ascii_letters, *",.!?"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(words) + len(letters))]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [-100.0 - i for i in range(len(letters))]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="session")
def sentence_piece(sentence_piece_metadata: dict[str, Any]) -> Tokenizer:
    """A tokenizer of that vocabulary."""
    return Tokenizer(gguf_parts(sentence_piece_metadata, Path("hand-made.gguf")))
