"""Golden cases of llama.cpp's vocabularies, whose expected ids Hugging Face's tokenizers made.

They are in llama.cpp's source (and in the source distribution of llama-cpp-python) under models/, as
ggml-vocab-NAME.gguf with .inp and .out beside it; too large to keep here.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tessera.model.gguf_file import GGUFFile
from tessera.text.gguf_tokenizer import gguf_parts
from tessera.text.tokenizer import Tokenizer

FOLDER = os.environ.get("GGUF_VOCAB_DIR")
NAMES = ["deepseek-coder", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "refact", "starcoder"]


@pytest.mark.skipif(FOLDER is None, reason="GGUF_VOCAB_DIR does not name a folder of ggml-vocab-*.gguf files")
@pytest.mark.parametrize("name", NAMES)
def test_vocabulary_gives_the_golden_ids(name: str) -> None:
    path = Path(str(FOLDER)) / f"ggml-vocab-{name}.gguf"
    tokenizer = Tokenizer(gguf_parts(GGUFFile(path).metadata, path))
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [[int(i) for i in line.split()] for line in Path(f"{path}.out").read_text().split("\n")]
    assert len(texts) > 40
    assert [tokenizer.encode(text, add_special_tokens=False) for text in texts] == expected[: len(texts)]
