"""Models of known shapes with random weights, for benchmarks: `dummy:gpt2` needs no download.

Each is a folder with a config.json and a tokenizer of single bytes, whose other tokens are `<256>`, `<257>`, ...
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tessera.errors import ModelError
from tessera.folders import cache_folder

PREFIX = "dummy:"


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    } | more


CONFIGS: dict[str, dict[str, Any]] = {
    "135m": _llama(576, 1536, 30, 9, 3, 49152),
    "360m": _llama(960, 2560, 32, 15, 5, 49152),
    "1.7b": _llama(2048, 8192, 24, 32, 32, 49152),
    "7b": _llama(4096, 14336, 32, 32, 8, 32000, tie_word_embeddings=False),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, tie_word_embeddings=False, rope_theta=500000.0),
    "qwen3-0.6b": _llama(
        1024,
        3072,
        28,
        16,
        8,
        151936,
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        attention_bias=False,
    ),
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
        "tie_word_embeddings": True,
    },
}
"""The shapes of SmolLM2-135M, -360M and -1.7B, of Mistral-7B v0.1 without its window, of Llama-3-8B, Qwen3-0.6B and
GPT-2; the Llamas and Qwen all with room for 32,768 tokens."""


def shape_folder(name: str) -> Path:
    """The folder of `dummy:NAME`, in the cache, made where it is missing; ModelError for a shape that is not known."""
    word = name.removeprefix(PREFIX).lower()
    if word not in CONFIGS:
        near = difflib.get_close_matches(word, CONFIGS, n=1)
        known = ", ".join(PREFIX + size for size in CONFIGS)
        raise ModelError(f"there is no model {name}", f"did you mean {PREFIX}{near[0]}?" if near else f"use {known}")
    config = CONFIGS[word] | {"torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
    try:
        folder = cache_folder() / "shapes" / f"dummy-{word}"
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "tokenizer.json", _tokenizer(config["vocab_size"]))
        _write(folder / "config.json", json.dumps(config, indent=1))
    except OSError as error:
        raise ModelError(f"{name} cannot be written to the cache: {error}", "set XDG_CACHE_HOME") from None
    return folder


def _write(path: Path, text: str) -> None:
    """Whole or not at all: another process may be reading it."""
    if path.exists() and path.read_text() == text:
        return
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(name).replace(path)


def _tokenizer(size: int) -> str:
    """A tokenizer.json that cuts text into bytes; the tokens that are no byte have a text, and come of none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    vocabulary |= {f"<{number}>": number for number in range(len(letters), size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str())
