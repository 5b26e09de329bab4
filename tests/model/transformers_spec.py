"""A ModelSpec as transformers' own reading of a config.json says it: what tessera's reading is held against.

This is the way in which tessera read configurations before it had `fill_in`: `AutoConfig`, then plain attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tessera.errors import ModelError
from tessera.model.hf_config import read_json
from tessera.model.hf_keys import check_keys, check_sizes
from tessera.model.layers.mlp import ACTIVATIONS
from tessera.model.limits import MOST, check_size
from tessera.model.spec import ModelSpec, Rope

_ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


def spec_through_transformers(folder: Path, dtype: torch.dtype) -> ModelSpec:
    """The spec of the model in `folder`, whose weights are of `dtype`; ModelError where transformers refuses it."""
    from transformers import AutoConfig

    raw = read_json(folder / "config.json")
    check_keys(raw, raw["model_type"])
    check_sizes(raw)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers' validation raises many kinds, its own among them
        raise ModelError(f"not a valid configuration: {error}") from None
    return _READERS.get(raw["model_type"], _read_decoder)(
        config, raw["model_type"], dtype, _eos_token_ids(config, folder)
    )


def _read_decoder(config: Any, model_type: str, dtype: torch.dtype, eos_token_ids: tuple[int, ...]) -> ModelSpec:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    check_size("config.json", "head_dim", head_dim, MOST["head_dim"])
    rope = _read_rope(config)
    is_qwen2 = model_type == "qwen2"
    return ModelSpec(
        architecture=model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_q_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        max_position=_max_position(config.max_position_embeddings, rope),
        norm_eps=config.rms_norm_eps,
        dtype=dtype,
        scale=head_dim**-0.5,
        windows=_windows(config, model_type),
        eos_token_ids=eos_token_ids,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        activation=_activation("hidden_act", config.hidden_act),
        rope=rope,
        qkv_bias=is_qwen2 or bool(getattr(config, "attention_bias", False)),
        output_bias=not is_qwen2 and bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=model_type == "qwen3",
    )


def _read_gpt2(config: Any, model_type: str, dtype: torch.dtype, eos_token_ids: tuple[int, ...]) -> ModelSpec:
    if config.n_embd % config.n_head:
        raise ModelError(f"config.json has n_embd {config.n_embd}, not a multiple of n_head {config.n_head}")
    head_dim = config.n_embd // config.n_head
    return ModelSpec(
        architecture=model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_inner or 4 * config.n_embd,
        num_layers=config.n_layer,
        num_q_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_dim=head_dim,
        max_position=config.n_positions,
        norm_eps=config.layer_norm_epsilon,
        dtype=dtype,
        scale=head_dim**-0.5 if config.scale_attn_weights else 1.0,
        windows=(None,) * config.n_layer,
        eos_token_ids=eos_token_ids,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        activation=_activation("activation_function", config.activation_function),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


_READERS: dict[str, Callable[[Any, str, torch.dtype, tuple[int, ...]], ModelSpec]] = {"gpt2": _read_gpt2}


def _windows(config: Any, model_type: str) -> tuple[int | None, ...]:
    window: int | None = getattr(config, "sliding_window", None)
    num_layers: int = config.num_hidden_layers
    if model_type == "mistral":
        return (window,) * num_layers
    kinds = (getattr(config, "layer_types", None) or []) if model_type != "llama" else []
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(f"config.json has layer_types with {kind!r:.80}, which is not supported")
        if kind == "sliding_attention" and window is None:
            raise ModelError("config.json has sliding_attention layers but no sliding_window in use")
    if not kinds:
        return (None,) * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _activation(key: str, value: Any) -> str:
    if value not in ACTIVATIONS:
        raise ModelError(f"config.json has {key} {value!r:.80}, supported are {', '.join(ACTIVATIONS)}")
    return str(value)


def _read_rope(config: Any) -> Rope:
    settings = {key: value for key, value in (config.rope_parameters or {}).items() if value is not None}
    kind, theta = settings.pop("rope_type", "default"), settings.pop("rope_theta", 10_000.0)
    settings.pop("type", None)
    if settings.get("partial_rotary_factor") == 1:
        settings.pop("partial_rotary_factor")
    if kind not in _ROPE_KEYS:
        raise ModelError(f"config.json has rope_type {kind!r:.80}, supported are {', '.join(_ROPE_KEYS)}")
    for key, value in settings.items():
        if key not in _ROPE_KEYS[kind]:
            raise ModelError(f"config.json has {key} {value!r:.80} in its rope settings, not supported with {kind}")
    try:
        return _make_rope(kind, float(theta), settings, config.max_position_embeddings)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"config.json has {kind} rope settings that do not fit: {error!r}"[:300]) from None


def _make_rope(kind: Any, theta: float, settings: dict[str, Any], max_position: int) -> Rope:
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, scaling=kind, factor=float(settings["factor"]))
    original = int(settings["original_max_position_embeddings"])
    if kind == "llama3":
        return Rope(
            theta=theta,
            scaling=kind,
            factor=float(settings["factor"]),
            original_max_position=original,
            low_freq_factor=float(settings["low_freq_factor"]),
            high_freq_factor=float(settings["high_freq_factor"]),
        )
    factor = float(settings.get("factor") or max_position / original)
    return Rope(
        theta=theta,
        scaling=kind,
        factor=factor,
        original_max_position=original,
        beta_fast=float(settings.get("beta_fast") or 32),
        beta_slow=float(settings.get("beta_slow") or 1),
        truncate=bool(settings.get("truncate", True)),
        attention_factor=_yarn_attention_factor(factor, settings),
    )


def _yarn_attention_factor(factor: float, settings: dict[str, Any]) -> float:
    """The paper's temperature, 0.1 ln(s) + 1 (YaRN, arXiv 2309.00071, equation 22), unless the file has its own."""
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return temperature(float(mscale)) / temperature(float(mscale_all_dim))
    return temperature(1.0)


def _max_position(max_position: int, rope: Rope) -> int:
    """Qwen's yarn configs keep the length before scaling in max_position_embeddings."""
    if rope.scaling != "yarn":
        return max_position
    return max(max_position, int(rope.factor * rope.original_max_position))


def _eos_token_ids(config: Any, folder: Path) -> tuple[int, ...]:
    """generation_config.json decides where it has a word on it, as in transformers' own generation."""
    path = folder / "generation_config.json"
    value = read_json(path).get("eos_token_id") if path.exists() else None
    if value is None:
        value = config.eos_token_id
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(token_id, int) or isinstance(token_id, bool) for token_id in values):
        raise ModelError(f"eos_token_id {value!r:.80} is not a token id or a list of them", f"mend {folder}")
    return tuple(values)
