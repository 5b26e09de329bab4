"""Tiny GGUF files with the weights of a transformers model, laid out as llama.cpp's converter lays them out."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(
    model: Any,
    path: Path,
    *,
    architecture: str,
    metadata: dict[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
    extra: dict[str, Any] | None = None,
    quantize: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    unquantized: Collection[str] = (),
) -> None:
    """Write `model`; matrices in the type `quantize`, without the tensors in `leave_out`, with those in `extra`.

    Those named in `unquantized` are floats whatever `quantize` says.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_metadata(model.config, architecture) | (metadata or {})).items():
        _add(writer, key, value)
    tensors = {_name(name): _layout(name, tensor, model, architecture) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("output.weight", None)
    for name, values in (tensors | (extra or {})).items():
        if name in leave_out:
            continue
        kind = quantize if values.ndim > 1 and name not in unquantized else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(config: Any, architecture: str) -> dict[str, Any]:
    gpt2 = architecture == "gpt2"
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": 4 * config.hidden_size if gpt2 else config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
    }
    if gpt2:
        values["attention.layer_norm_epsilon"] = config.layer_norm_epsilon
    else:
        values["attention.head_count_kv"] = config.num_key_value_heads
        values["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
        values["rope.freq_base"] = config.rope_parameters["rope_theta"]
        if getattr(config, "head_dim", None):
            values["attention.key_length"] = values["attention.value_length"] = config.head_dim
    return {f"{architecture}.{key}": value for key, value in values.items()} | {"tokenizer.ggml.eos_token_id": 3}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_uint32(key, value)


def _name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    for prefix in ("model.layers.", "transformer.h."):
        if stem.startswith(prefix):
            layer, stem = stem.removeprefix(prefix).split(".", 1)
            return f"blk.{layer}.{_NAMES[stem]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


def _layout(name: str, tensor: Any, model: Any, architecture: str) -> np.ndarray[Any, Any]:
    values = tensor.float().numpy()
    if architecture == "gpt2" and "h." in name and values.ndim == 2:
        return np.ascontiguousarray(values.T)
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        config = model.config
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return permute(values, heads)
    return np.ascontiguousarray(values)


def permute(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to q and k of the architecture `llama`."""
    split = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))
