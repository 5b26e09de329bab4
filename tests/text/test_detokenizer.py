"""Incremental detokenisation against decoding everything at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tessera.text.detokenizer import make_detokenizer
from tessera.text.gguf_tokenizer import NORMAL, USER_DEFINED, gguf_parts
from tessera.text.parts import TokenizerParts
from tessera.text.pieces import Spelling
from tessera.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
ids_of_smollm = st.lists(st.one_of(st.integers(0, 400), st.integers(0, 49151)), max_size=40)
ids_of_sentence_piece = st.lists(
    st.one_of(st.integers(0, 2), st.integers(0xC0, 0xFF), st.integers(0, 325)), max_size=30
)


def pieces(tokenizer: Tokenizer, ids: list[int], prompt: list[int], *, skip: bool = True) -> list[str]:
    """What each token gives, and at last what the flush gives."""
    detokenizer = make_detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [*(detokenizer.feed([token_id]) for token_id in ids), detokenizer.flush()]


@given(ids=ids_of_smollm, skip=st.booleans())
def test_byte_level_pieces_join_to_the_full_decode_for_any_ids(smollm: Tokenizer, ids: list[int], skip: bool) -> None:
    assert smollm.pieces.spelling is Spelling.BYTE_LEVEL
    assert "".join(pieces(smollm, ids, [5, 6], skip=skip)) == smollm.decode(ids, skip_special_tokens=skip)


@given(ids=ids_of_sentence_piece, skip=st.booleans())
def test_sentence_piece_pieces_join_to_the_full_decode_for_any_ids(
    sentence_piece: Tokenizer, ids: list[int], skip: bool
) -> None:
    assert sentence_piece.pieces.spelling is Spelling.BYTE_FALLBACK
    decode = sentence_piece.decode
    bos = [1] if skip else []
    assert "".join(pieces(sentence_piece, ids, bos, skip=skip)) == decode(ids, skip_special_tokens=skip)
    prompt = sentence_piece.encode("hello")
    continued = decode(prompt + ids, skip_special_tokens=skip)[len(decode(prompt, skip_special_tokens=skip)) :]
    assert "".join(pieces(sentence_piece, ids, prompt, skip=skip)) == continued


@given(text=st.text(st.sampled_from("ab é中🙂👩‍👩‍👧🇩🇪\u0301\n"), max_size=20))
def test_whole_texts_never_show_half_a_character(smollm: Tokenizer, sentence_piece: Tokenizer, text: str) -> None:
    for tokenizer in (smollm, sentence_piece):
        ids = tokenizer.encode(text, add_special_tokens=False)
        given_out = pieces(tokenizer, ids, [])
        assert REPLACEMENT not in "".join(given_out)
        assert "".join(given_out) == text


def test_half_a_character_waits_and_is_replaced_only_at_the_end(smollm: Tokenizer) -> None:
    ids = smollm.encode("a𝄞b", add_special_tokens=False)
    assert [text for text in pieces(smollm, ids, []) if text] == ["a", "𝄞", "b"]
    cut = pieces(smollm, ids[:-2], [])
    assert cut[0] == "a"
    assert set(cut[1:-1]) == {""}
    assert cut[-1] == REPLACEMENT


def test_a_real_replacement_character_is_text_like_any_other(smollm: Tokenizer) -> None:
    ids = smollm.encode("a\ufffdb", add_special_tokens=False)
    given_out = pieces(smollm, ids, [])
    assert [text for text in given_out if text] == ["a", REPLACEMENT, "b"]


def test_a_byte_level_token_that_is_plain_text_is_given_as_it_is() -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "Ġ", "Ã", "¼", "<ü b>"],
        "tokenizer.ggml.token_type": [NORMAL] * 4 + [USER_DEFINED],
        "tokenizer.ggml.merges": [],
    }
    tokenizer = Tokenizer(gguf_parts(metadata, Path("x.gguf")))
    ids = tokenizer.encode("a ü<ü b>a")
    assert ids == [0, 1, 2, 3, 4, 0]
    assert "".join(pieces(tokenizer, ids, [])) == tokenizer.decode(ids) == "a ü<ü b>a"


def test_output_that_continues_text_keeps_its_leading_space(sentence_piece: Tokenizer) -> None:
    world = sentence_piece.encode("world", add_special_tokens=False)
    assert "".join(pieces(sentence_piece, world, sentence_piece.encode("hello"))) == " world"
    assert "".join(pieces(sentence_piece, world, [1])) == "world"


def test_vocabulary_without_space_prefix_strips_nothing(sentence_piece_metadata: dict[str, Any]) -> None:
    metadata = sentence_piece_metadata | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = Tokenizer(gguf_parts(metadata, Path("x.gguf")))
    ids = tokenizer.encode(" world", add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids, [])) == " world"


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Metaspace()])
@given(ids=st.lists(st.integers(0, 4), max_size=12))
def test_other_decoders_join_to_the_full_decode(decoder: decoders.Decoder | None, ids: list[int]) -> None:
    backend = Backend(models.WordLevel({"▁one": 0, "two": 1, "##s": 2, ",": 3, "中": 4}, unk_token="two"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        backend.decoder = decoder
    tokenizer = Tokenizer(TokenizerParts(backend=backend))
    assert tokenizer.pieces.spelling is Spelling.OTHER
    assert "".join(pieces(tokenizer, ids, [])) == tokenizer.decode(ids)


def test_a_long_text_costs_a_token_as_much_as_a_short_one(smollm: Tokenizer) -> None:
    ids = smollm.encode("The quick brown fox 🙂 " * 1000)
    start = time.process_time()
    pieces(smollm, ids * 4, [])
    assert time.process_time() - start < 5  # 0.05 s; a decode of everything a token would take minutes
