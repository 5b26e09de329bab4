"""Every family against transformers: logits at every position, in fp32, within 1e-4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dense_attention import all_logits
from tessera.model.language_model import LanguageModel
from tessera.model.registry import load_model, load_spec
from tessera.model.source import ModelSource
from tiny_models import make_model

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama head_dim 20, not hidden / heads": ("llama", {"head_dim": 20}),
    "llama as many key heads": ("llama", {"num_key_value_heads": 4}),
    "llama one key head": ("llama", {"num_key_value_heads": 1}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
    "llama llama3 scaling": ("llama", {"rope_parameters": LLAMA3, "head_dim": 64}),
    "llama linear scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}},
    ),
    "llama yarn scaling": ("llama", {"rope_parameters": YARN, "head_dim": 64}),
    "llama yarn without rounding": ("llama", {"rope_parameters": YARN | {"truncate": False}, "head_dim": 64}),
    "llama yarn with mscale": (
        "llama",
        {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 16}, "head_dim": 64},
    ),
    "mistral window 16": ("mistral", {"sliding_window": 16}),
    "mistral window 1": ("mistral", {"sliding_window": 1}),
    "mistral without window": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 window in later layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen2 window switched off": ("qwen2", {"use_sliding_window": False, "sliding_window": 4}),
    "qwen2 layer types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3 head_dim 24": ("qwen3", {"head_dim": 24}),
    "qwen3 biases, window": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 2,
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2 untied, inner 70, unscaled": (
        "gpt2",
        {"tie_word_embeddings": False, "n_inner": 70, "scale_attn_weights": False},
    ),
    "gpt2 relu": ("gpt2", {"activation_function": "relu"}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_at_every_position(case: str, folder: Path, source: ModelSource) -> None:
    family, settings = CASES[case]
    theirs = make_model(family, folder, **settings)
    ours = _load(source)
    generator = torch.Generator().manual_seed(1)
    long, short = (torch.randint(0, 96, (length,), generator=generator) for length in (90, 7))
    for ours_logits, token_ids in zip(all_logits(ours, long.tolist(), short.tolist()), (long, short), strict=True):
        with torch.inference_mode():
            expected = theirs(token_ids[None]).logits[0]
        assert ours_logits.dtype == torch.float32
        assert expected.abs().max() > 0.5  # a model whose logits are all small would prove nothing
        torch.testing.assert_close(ours_logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_stay_close_to_fp32(family: str, dtype: torch.dtype, folder: Path, source: ModelSource) -> None:
    make_model(family, folder)
    token_ids = list(range(40))
    (exact,), (half,) = all_logits(_load(source), token_ids), all_logits(_load(source, dtype), token_ids)
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 0.1 * exact.abs().max()


def test_spec_states_what_config_says(folder: Path, source: ModelSource) -> None:
    settings = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "head_dim": 24}
    make_model("qwen3", folder, **settings, eos_token_id=[5, 7])
    spec = load_spec(source)
    assert (spec.head_dim, spec.num_q_heads, spec.num_kv_heads, spec.hidden_size) == (24, 4, 2, 48)
    assert spec.windows == (None, 16, 16)
    assert spec.eos_token_ids == (5, 7)
    assert spec.qk_norm and not spec.qkv_bias
    assert spec.scale == 24**-0.5


def test_generation_config_decides_the_end_tokens(folder: Path, source: ModelSource) -> None:
    make_model("llama", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 11]}')
    assert load_spec(source).eos_token_ids == (9, 11)


def test_yarn_reaches_its_stretched_length(folder: Path, source: ModelSource) -> None:
    make_model("qwen2", folder, rope_parameters=YARN, max_position_embeddings=64)
    assert load_spec(source).max_position == 256


def test_dtype_of_the_checkpoint_is_found_where_config_is_silent(folder: Path, source: ModelSource) -> None:
    make_model("llama", folder).to(torch.float16).save_pretrained(folder)
    assert load_spec(source).dtype == torch.float16
    config = (folder / "config.json").read_text().replace('"dtype"', '"_dtype"')
    (folder / "config.json").write_text(config)
    assert load_spec(source).dtype == torch.float16


def _load(source: ModelSource, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return load_model(load_spec(source), source, dtype=dtype, device=CPU)
