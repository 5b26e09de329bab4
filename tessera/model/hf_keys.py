"""Which keys of a config.json are honoured; any other that looks as if it changed the computation is refused.

transformers keeps unknown keys as attributes and computes without them; here they stop the start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tessera.errors import ModelError
from tessera.log import logger
from tessera.model.hf_defaults import DEFAULTS
from tessera.model.limits import MOST, check_size

READ: dict[str, set[str]] = {model_type: set(rows) for model_type, rows in DEFAULTS.items()}
"""model_type -> the keys its spec is made from."""

HOLDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True, "qkv_bias": True},
    "qwen3": {"use_qk_norm": True, "qk_norm": True},
    "gpt2": {"position_embedding_type": "absolute"},
}
"""model_type -> keys that may be spelt out with the one value that the family always has."""

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "n_embd": "hidden_size",
    "intermediate_size": "intermediate_size",
    "n_inner": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "n_layer": "num_layers",
    "num_attention_heads": "num_q_heads",
    "n_head": "num_q_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position",
    "n_positions": "max_position",
}
"""Key -> the field of ModelSpec that it becomes, in any family: GPT-2's may be spelt either way."""

_HARMLESS = re.compile(
    r"drop|^summary_|flash_attn|^_?attn_implementation|^transformers|^(torch_)?dtype$|^use_cache$|^initializer_range$"
)
_SUSPECT = re.compile(
    r"attn|attention|rope|rotary|window|softcap|sink|scal|multiplier|alibi|expert|moe|norm|bias|layer_type|"
    r"quant|compress|residual|logit|position_embedding|mup|kv|lora|mlp|per_layer|pruned|encoder|cross|vision|mm_"
)
_IDENTITY = re.compile(r"scal|multiplier|factor")


def check_keys(raw: Mapping[str, Any], model_type: str) -> None:
    """Raise ModelError for the first key of a config.json that asks for something that is not computed."""
    if raw.get("auto_map"):
        raise ModelError(
            f"config.json has auto_map {raw['auto_map']!r:.120}: the model needs code from its repository, "
            "which is never run",
            "use a model of a family that `tessera` has, without auto_map",
        )
    _check_architectures(raw.get("architectures"))
    unknown = [key for key in raw if key not in READ[model_type]]
    for key in unknown:
        if _changes_computation(key, raw[key], HOLDS[model_type]):
            raise ModelError(
                f"config.json has {key} {raw[key]!r:.120}, which is not supported for {model_type}",
                "use another model; the answers would be wrong without it",
            )
    logger.debug("config.json keys without effect: %s", ", ".join(sorted(unknown)))


def check_sizes(raw: Mapping[str, Any]) -> None:
    """Raise ModelError for the first size in a config.json that no model has, before anything is built from it."""
    for key, field in _SIZES.items():
        if raw.get(key) is not None:  # whether null is allowed is a matter of the family
            check_size("config.json", key, raw[key], MOST[field])


def _changes_computation(key: str, value: Any, holds: Mapping[str, Any]) -> bool:
    if not value or _HARMLESS.search(key) or not _SUSPECT.search(key):
        return False
    if key in holds:
        return bool(value != holds[key])
    identity = _IDENTITY.search(key) is not None and isinstance(value, (int, float)) and not isinstance(value, bool)
    return not (identity and value == 1)


def _check_architectures(architectures: Any) -> None:
    names = architectures if isinstance(architectures, list) else []
    if names and not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise ModelError(
            f"config.json has architectures {names!r:.120}, none of which generates text",
            "use a model whose architecture ends in ForCausalLM",
        )
