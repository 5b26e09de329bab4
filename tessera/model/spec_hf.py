"""A ModelSpec from a Hugging Face folder: config.json, with transformers' defaults for what it leaves out.

transformers itself is not imported: that takes seconds, more than all else at start (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tessera.errors import ModelError
from tessera.model.hf_config import HINT, fill_in, is_a, read_json
from tessera.model.hf_defaults import LAYER_TYPES
from tessera.model.hf_keys import READ, check_keys, check_sizes
from tessera.model.hf_rope import read_rope
from tessera.model.layers.mlp import ACTIVATIONS
from tessera.model.limits import MOST, check_size
from tessera.model.spec import ModelSpec, Rope

_Config = Mapping[str, Any]
"""A config.json with all its keys, as `fill_in` makes it."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def spec_from_folder(folder: Path) -> ModelSpec:
    """The spec of the model in `folder`; ModelError where config.json is missing, broken or not supported."""
    raw = read_json(folder / "config.json")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{folder / 'config.json'} has no model_type", "is it a transformers model?")
    if model_type not in READ:
        raise ModelError(f"the architecture {model_type!r:.80} is not supported", f"supported are {', '.join(READ)}")
    check_keys(raw, model_type)
    check_sizes(raw)
    config = fill_in(raw, model_type)
    dtype = _checkpoint_dtype(raw, folder)
    eos_token_ids = _eos_token_ids(config, folder)
    return _READERS.get(model_type, _read_decoder)(config, model_type, dtype, eos_token_ids)


def _read_decoder(config: _Config, model_type: str, dtype: torch.dtype, eos_token_ids: tuple[int, ...]) -> ModelSpec:
    if model_type == "llama":
        _check_multiple(config, "hidden_size", "num_attention_heads")
    head_dim = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    check_size("config.json", "head_dim", head_dim, MOST["head_dim"])
    rope = read_rope(config)
    is_qwen2 = model_type == "qwen2"
    return ModelSpec(
        architecture=model_type,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_q_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"] or config["num_attention_heads"],
        head_dim=head_dim,
        max_position=_max_position(config["max_position_embeddings"], rope),
        norm_eps=float(config["rms_norm_eps"]),
        dtype=dtype,
        scale=head_dim**-0.5,
        windows=_windows(config, model_type),
        eos_token_ids=eos_token_ids,
        tie_word_embeddings=config["tie_word_embeddings"],
        activation=_activation("hidden_act", config["hidden_act"]),
        rope=rope,
        qkv_bias=is_qwen2 or config.get("attention_bias", False),
        output_bias=not is_qwen2 and config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        qk_norm=model_type == "qwen3",
    )


def _read_gpt2(config: _Config, model_type: str, dtype: torch.dtype, eos_token_ids: tuple[int, ...]) -> ModelSpec:
    _check_multiple(config, "n_embd", "n_head")
    head_dim = config["n_embd"] // config["n_head"]
    return ModelSpec(
        architecture=model_type,
        vocab_size=config["vocab_size"],
        hidden_size=config["n_embd"],
        intermediate_size=config["n_inner"] or 4 * config["n_embd"],
        num_layers=config["n_layer"],
        num_q_heads=config["n_head"],
        num_kv_heads=config["n_head"],
        head_dim=head_dim,
        max_position=config["n_positions"],
        norm_eps=float(config["layer_norm_epsilon"]),
        dtype=dtype,
        scale=head_dim**-0.5 if config["scale_attn_weights"] else 1.0,
        windows=(None,) * config["n_layer"],
        eos_token_ids=eos_token_ids,
        tie_word_embeddings=config["tie_word_embeddings"],
        activation=_activation("activation_function", config["activation_function"]),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


_READERS: dict[str, Callable[[_Config, str, torch.dtype, tuple[int, ...]], ModelSpec]] = {"gpt2": _read_gpt2}


def _check_multiple(config: _Config, width: str, heads: str) -> None:
    if config[width] % config[heads]:
        raise ModelError(f"config.json has {width} {config[width]}, not a multiple of {heads} {config[heads]}", HINT)


def _windows(config: _Config, model_type: str) -> tuple[int | None, ...]:
    num_layers: int = config["num_hidden_layers"]
    if model_type == "mistral":
        return (config["sliding_window"],) * num_layers
    if "layer_types" not in config:
        return (None,) * num_layers
    window: int | None = config["sliding_window"] if config["use_sliding_window"] else None
    if config["layer_types"] is None:
        full = num_layers if window is None else config["max_window_layers"]
        return tuple(None if layer < full else window for layer in range(num_layers))
    return tuple(_window_of(kind, window) for kind in _layer_types(config))


def _layer_types(config: _Config) -> list[Any]:
    kinds: list[Any] = config["layer_types"]
    if len(kinds) != config["num_hidden_layers"]:
        raise ModelError(
            f"config.json has layer_types {kinds!r:.80} of {len(kinds)} layers, "
            f"but num_hidden_layers {config['num_hidden_layers']}",
            HINT,
        )
    return kinds


def _window_of(kind: Any, window: int | None) -> int | None:
    if not isinstance(kind, str) or LAYER_TYPES.get(kind, kind) not in ("full_attention", "sliding_attention"):
        raise ModelError(
            f"config.json has layer_types with {kind!r:.80}, which is not supported",
            "use a model of full_attention and sliding_attention layers",
        )
    if kind != "sliding_attention":
        return None
    if window is None:
        raise ModelError(
            "config.json has sliding_attention layers but no sliding_window in use",
            "set use_sliding_window to true and sliding_window, or mend layer_types",
        )
    return window


def _activation(key: str, value: str) -> str:
    if value not in ACTIVATIONS:
        raise ModelError(
            f"config.json has {key} {value!r:.80}, supported are {', '.join(ACTIVATIONS)}", "use another model"
        )
    return value


def _max_position(max_position: int, rope: Rope) -> int:
    """Qwen's yarn configs keep the length before scaling in max_position_embeddings."""
    if rope.scaling != "yarn":
        return max_position
    return max(max_position, int(rope.factor * rope.original_max_position))


def _eos_token_ids(config: _Config, folder: Path) -> tuple[int, ...]:
    """generation_config.json decides where it has a word on it, as in transformers' own generation."""
    path = folder / "generation_config.json"
    value = read_json(path).get("eos_token_id") if path.exists() else None
    token_ids = _token_ids(config["eos_token_id"], folder / "config.json")
    return token_ids if value is None else _token_ids(value, path)


def _token_ids(value: Any, path: Path) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_a(int, token_id) for token_id in values):
        raise ModelError(f"eos_token_id {value!r:.80} is not a token id or a list of them", f"mend {path}")
    return tuple(values)


def _checkpoint_dtype(raw: dict[str, Any], folder: Path) -> torch.dtype:
    name = raw.get("dtype", raw.get("torch_dtype"))
    if name is None:
        return _first_tensor_dtype(folder)
    if not isinstance(name, str) or name not in _DTYPES:
        raise ModelError(
            f"config.json has dtype {name!r:.80}, supported are {', '.join(_DTYPES)}", "convert the model's weights"
        )
    return _DTYPES[name]


def _first_tensor_dtype(folder: Path) -> torch.dtype:
    """Read from a safetensors header; float32 where there are no weights, as with dummy ones."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = file.read(8 + 100_000)[8:].decode("utf-8", "replace")
        for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16)):
            if f'"dtype":"{name}"' in header.replace(" ", ""):
                return dtype
    return torch.float32
