"""The numeric reference of the project: transformers' own model, with the weights that we read from a GGUF file.

transformers' GGUF loader takes 14 s for the default model and needs accelerate; this takes about one.
"""

from __future__ import annotations

from typing import Any

import torch

from tessera.config import ModelConfig
from tessera.model.gguf_file import GGUFFile
from tessera.model.gguf_weights import load_gguf
from tessera.model.layers.parameter import Placement
from tessera.model.llama import Llama
from tessera.model.registry import load_spec
from tessera.model.source import ModelSource, find_model
from tessera.model.spec import ModelSpec


def default_source() -> ModelSource:
    """The model that is used when --model is left out."""
    return find_model(ModelConfig())


def default_model_reference(dtype: torch.dtype = torch.float32) -> Any:
    """transformers on the weights of the default model; ask for `dtype` here, since `.to` would round its rope too."""
    return reference_model(default_source(), dtype)


def reference_model(source: ModelSource, dtype: torch.dtype = torch.float32) -> Any:
    """A transformers LlamaForCausalLM with the weights of a Llama GGUF file, in eval mode on the CPU."""
    from transformers import LlamaForCausalLM

    spec = load_spec(source)
    ours = Llama(spec, Placement(dtype, torch.device("cpu")))
    load_gguf(ours, GGUFFile(source.path), progress=False)
    with torch.device("meta"):
        theirs: Any = LlamaForCausalLM(_config(spec))
    missing, unexpected = theirs.load_state_dict(ours.slots(), strict=False, assign=True)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if spec.tie_word_embeddings else set())
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # its table is not in the state
    return theirs.eval()


def _config(spec: ModelSpec) -> Any:
    from transformers import LlamaConfig

    assert spec.architecture == "llama" and spec.rope is not None and spec.rope.scaling == "default"
    return LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_q_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        hidden_act=spec.activation,
        max_position_embeddings=spec.max_position,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope.theta},
        tie_word_embeddings=spec.tie_word_embeddings,
        eos_token_id=list(spec.eos_token_ids),
        bos_token_id=None,
    )
