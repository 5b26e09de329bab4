"""What transformers takes a config.json to say about the keys that it leaves out, as data.

From the classes in models/{llama,mistral,qwen2,qwen3,gpt2}/configuration_*.py of transformers 5.23.0 (Apache 2.0):
their fields, types and `__post_init__`, and from `RotaryEmbeddingConfigMixin` in modeling_rope_utils.py. Importing
transformers costs seconds, so they are written down here; tests hold them against the installed version.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Key(NamedTuple):
    """One key of a config.json."""

    default: Any
    """Its value where the file leaves it out."""
    kind: type
    """Of its value: int, float (any number), bool, str, list, dict or object (anything)."""
    null: bool = False
    """Whether it may be null, which is a value of its own and not the default."""


_NONE_OF = {kind: Key(None, kind, null=True) for kind in (int, float, list, dict, object)}
_DECODER: dict[str, Key] = {
    "vocab_size": Key(32000, int),
    "hidden_size": Key(4096, int),
    "intermediate_size": Key(11008, int),
    "num_hidden_layers": Key(32, int),
    "num_attention_heads": Key(32, int),
    "num_key_value_heads": _NONE_OF[int],
    "head_dim": _NONE_OF[int],
    "hidden_act": Key("silu", str),
    "max_position_embeddings": Key(2048, int),
    "rms_norm_eps": Key(1e-6, float),
    "tie_word_embeddings": Key(default=False, kind=bool),
    "eos_token_id": Key(2, object, null=True),
    "rope_parameters": _NONE_OF[dict],
    "rope_scaling": _NONE_OF[object],
    "rope_theta": Key(10_000.0, float, null=True),
    "partial_rotary_factor": _NONE_OF[float],
    "original_max_position_embeddings": _NONE_OF[object],
}
"""Llama's, and the base of the others. The last one has no effect outside of the rotary settings."""

_QWEN2: dict[str, Key] = _DECODER | {
    "vocab_size": Key(151936, int),
    "intermediate_size": Key(22016, int),
    "num_key_value_heads": Key(32, int, null=True),
    "max_position_embeddings": Key(32768, int),
    "eos_token_id": _NONE_OF[object],
    "use_sliding_window": Key(default=False, kind=bool),
    "sliding_window": Key(4096, int, null=True),
    "max_window_layers": Key(28, int),
    "layer_types": _NONE_OF[list],
}

DEFAULTS: dict[str, dict[str, Key]] = {
    "llama": _DECODER | {"attention_bias": Key(default=False, kind=bool), "mlp_bias": Key(default=False, kind=bool)},
    "mistral": _DECODER
    | {
        "intermediate_size": Key(14336, int),
        "num_key_value_heads": Key(8, int),
        "max_position_embeddings": Key(131072, int),
        "sliding_window": Key(4096, int, null=True),
    },
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": Key(128, int), "attention_bias": Key(default=False, kind=bool)},
    "gpt2": {
        "vocab_size": Key(50257, int),
        "n_positions": Key(1024, int),
        "n_embd": Key(768, int),
        "n_layer": Key(12, int),
        "n_head": Key(12, int),
        "n_inner": _NONE_OF[int],
        "activation_function": Key("gelu_new", str),
        "layer_norm_epsilon": Key(1e-5, float),
        "scale_attn_weights": Key(default=True, kind=bool),
        "tie_word_embeddings": Key(default=True, kind=bool),
        "eos_token_id": Key(50256, object, null=True),
    },
}
"""model_type -> the keys that its spec is made from."""

ALIASES: dict[str, dict[str, str]] = {"gpt2": {"hidden_size": "n_embd", "num_hidden_layers": "n_layer"}}
"""model_type -> another name of a key -> the key; where a file has both, the other name decides."""

LAYER_TYPES = {"attention": "full_attention"}
"""A former name in `layer_types` -> its name."""
