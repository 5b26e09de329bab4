"""Tokenizers out of GGUF metadata: the default model's, a hand-made SentencePiece one, and damaged ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tessera.errors import ModelError
from tessera.text.gguf_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, gguf_parts
from tessera.text.pieces import BYTE_OF_CHARACTER
from tessera.text.tokenizer import Tokenizer

TEXTS = [
    "Hello, world!",
    "def f(x):\n\treturn x ** 2  # 12345 67\n\n\n",
    "naïve café — “quotes” … ½ ²",
    "cafe\u0301 n\u0303 a\u0323\u0302",
    "中文和日本語とカタカナ 한국어",
    "🙂👩‍👩‍👧‍👦🇩🇪 👍🏽",
    "   leading,   inner   and trailing   ",
    "\r\n\t\x0b\x00\x7f\u200b\ufeff",
    "\ufffd is a character of its own",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_default_tokenizer_gives_back_the_text(smollm: Tokenizer, text: str) -> None:
    assert smollm.decode(smollm.encode(text)) == text


@given(st.text(st.characters(max_codepoint=0xFFFF, codec="utf-8")))
def test_default_tokenizer_gives_back_any_text(smollm: Tokenizer, text: str) -> None:
    spelt = {BYTE_OF_CHARACTER[piece] for piece in BYTE_OF_CHARACTER if smollm.backend.token_to_id(piece) is not None}
    assume(spelt.issuperset(text.encode()))  # SmolLM2 has no token for some rare bytes: as Hugging Face, we drop them
    assert smollm.decode(smollm.encode(text), skip_special_tokens=False) == text


def test_default_tokenizer_is_smollm2(smollm: Tokenizer) -> None:
    assert smollm.vocab_size == 49152
    assert (smollm.bos_token_id, smollm.eos_token_id, smollm.end_token_ids) == (1, 2, (2,))
    assert smollm.encode("<|im_start|>user\nHello world 123<|im_end|>\n") == [
        1,
        4093,
        198,
        19556,
        905,
        216,
        33,
        34,
        35,
        2,
        198,
    ]


def test_digits_stand_alone_and_special_tokens_are_skipped(smollm: Tokenizer) -> None:
    ids = smollm.encode("2048<|im_end|>")
    assert [smollm.token_text(i) for i in ids] == ["2", "0", "4", "8", "<|im_end|>"]
    assert smollm.decode(ids) == "2048"
    assert smollm.decode(ids, skip_special_tokens=False) == "2048<|im_end|>"


def test_a_token_that_is_half_a_character_reads_as_a_replacement(smollm: Tokenizer) -> None:
    ids = smollm.encode("𝄞")
    assert len(ids) > 1
    assert b"".join(smollm.token_bytes(i) for i in ids) == "𝄞".encode()
    assert "\ufffd" in smollm.token_text(ids[0])
    assert smollm.token_text(10**6) == ""


def test_loading_the_default_tokenizer_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from tessera.config import ModelConfig; from tessera.model.source import find_model;"
        "from tessera.text.tokenizer import load_tokenizer; c = ModelConfig(); t = load_tokenizer(find_model(c), c);"
        "t.render_chat([{'role': 'user', 'content': 'hi'}]);"
        "print(sorted({'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("hello world", ["<s>", "▁hello", "▁world"]),
        (" hello", ["<s>", "▁", "▁hello"]),
        ("   x", ["<s>", "▁▁", "▁▁", "x"]),
        ("中 é", ["<s>", "▁", "中", "▁", "<0xC3>", "<0xA9>"]),
        ("held", ["<s>", "▁hel", "d"]),
        ("a\n", ["<s>", "▁", "a", "<0x0A>"]),
        ("", ["<s>"]),
    ],
)
def test_sentence_piece_joins_the_best_scored_neighbours(
    sentence_piece: Tokenizer, text: str, pieces: list[str]
) -> None:
    ids = sentence_piece.encode(text)
    assert [sentence_piece.backend.id_to_token(i) for i in ids] == pieces
    assert sentence_piece.decode(ids) == text


@given(st.text(st.characters(exclude_characters="▁", codec="utf-8")))
def test_sentence_piece_gives_back_any_text(sentence_piece: Tokenizer, text: str) -> None:
    ids = sentence_piece.encode(text, add_special_tokens=False)
    assert sentence_piece.decode(ids, skip_special_tokens=False) == text


def test_sentence_piece_without_space_prefix_and_with_eos(sentence_piece_metadata: dict[str, Any]) -> None:
    metadata = sentence_piece_metadata | {
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
    }
    tokenizer = Tokenizer(gguf_parts(metadata, Path("x.gguf")))
    ids = tokenizer.encode("hello")
    assert [tokenizer.backend.id_to_token(i) for i in ids] == ["h", "el", "lo", "</s>"]
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"


def byte_level_metadata() -> dict[str, Any]:
    """A tiny byte-level vocabulary with a token of every type."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "Ġ", "<end>", "<tool>", "[PAD6]"],
        "tokenizer.ggml.token_type": [NORMAL] * 4 + [CONTROL, USER_DEFINED, UNUSED],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.ggml.eot_token_id": 4,
    }


def test_token_types_become_special_and_added_tokens() -> None:
    tokenizer = Tokenizer(gguf_parts(byte_level_metadata(), Path("x.gguf")))
    ids = tokenizer.encode("ab<tool>a<end>")
    assert ids == [2, 5, 0, 4]
    assert tokenizer.decode(ids) == "ab<tool>a"
    assert tokenizer.decode([6]) == ""
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.end_token_ids) == (7, 4, (4,))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer.ggml.pre": "no-such"}, "its pre-tokenizer is 'no-such'; known exactly are"),
        ({"tokenizer.ggml.pre": None}, "does not name its pre-tokenizer"),
        ({"tokenizer.ggml.pre": 3}, "tokenizer.ggml.pre is 3, not a str"),
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported"),
        ({"tokenizer.ggml.model": None}, "is not supported"),
        ({"tokenizer.ggml.tokens": None}, "holds no tokenizer"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "holds no tokenizer"),
        ({"tokenizer.ggml.token_type": [1]}, "7 tokens, 1 types"),
        ({"tokenizer.ggml.merges": ["a c"]}, "damaged"),
        ({"tokenizer.ggml.merges": ["ab"]}, "damaged"),
        ({"tokenizer.ggml.eos_token_id": 7}, "the vocabulary has 7 tokens"),
        ({"tokenizer.ggml.model": "llama"}, "7 tokens, 0 scores"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.precompiled_charsmap": [1]}, "changes the text"),
    ],
)
def test_damaged_or_unknown_tokenizers_are_refused_with_the_file_and_a_hint(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        gguf_parts(byte_level_metadata() | change, Path("x.gguf"))
    assert "x.gguf" in caught.value.message
    assert caught.value.hint is not None and "--tokenizer" in caught.value.hint


def test_gpt2_files_from_before_pre_tokenizers_had_names_are_read() -> None:
    metadata = byte_level_metadata() | {"tokenizer.ggml.pre": None, "general.architecture": "gpt2"}
    assert Tokenizer(gguf_parts(metadata, Path("x.gguf"))).encode("ab") == [2]
