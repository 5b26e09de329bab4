"""Tiny random models of every family, as transformers makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 3,
    "bos_token_id": 1,
    "pad_token_id": None,
}
"""Enough layers and heads that a swapped index shows; weights are scaled up so that every part matters."""


def make_model(family: str, folder: Path, **settings: Any) -> Any:
    """A tiny random transformers model of `family`, saved to `folder`; in eval mode."""
    import transformers

    config_type, model_type = {
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "mistral": ("MistralConfig", "MistralForCausalLM"),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
        "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    }[family]
    if family == "gpt2":
        small = {"vocab_size": 96, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256, "eos_token_id": 3}
    else:
        small = SMALL
    config = getattr(transformers, config_type)(**(small | settings))
    torch.manual_seed(0)
    model = getattr(transformers, model_type)._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else 0.15
            parameter.normal_(1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0, spread)
    model.tie_weights()
    model.save_pretrained(folder)
    return model.eval()
