"""A ModelSpec from the metadata of a GGUF file, and from which tensors it has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tessera.errors import ModelError
from tessera.model.gguf_file import GGUFFile
from tessera.model.gguf_quants import FLOATS, dequantize
from tessera.model.gguf_weights import FREQUENCY_FACTORS
from tessera.model.limits import MOST, check_size
from tessera.model.spec import ModelSpec, Rope

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
"""general.architecture; Mistral's files say llama."""

_READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scale_linear",
}
_SIZES = {
    "block_count": "num_layers",
    "context_length": "max_position",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_q_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_dim",
}
"""Key -> the field of ModelSpec that it becomes."""
_PART_NAME = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_HARMLESS = {"tensor_data_layout"}
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")


def spec_from_gguf(file: GGUFFile) -> ModelSpec:
    """The spec of the model in `file`; ModelError where its metadata is incomplete or not supported."""
    _refuse_parts(file.path, file.metadata.get("split.count", 1))
    keys = _Keys(file)
    return _gpt2(keys) if keys.architecture == "gpt2" else _decoder(keys)


def _refuse_parts(path: Path, num_parts: object) -> None:
    if isinstance(num_parts, bool) or not isinstance(num_parts, int):
        raise ModelError(f"{path} has split.count {num_parts!r:.80}, not a whole number", "convert the model again")
    named = _PART_NAME.search(path.name)
    num_parts = max(num_parts, int(named[1]) if named else 1)
    if num_parts > 1:
        raise ModelError(
            f"{path} is one of {num_parts} parts, and split GGUF files are not read",
            f"merge them: llama-gguf-split --merge {path.name} merged.gguf, from the first part",
        )


class _Keys:
    """The metadata under the architecture's own prefix."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = file.metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"{file.path} has the architecture {self.architecture!r:.80}, which is not supported",
                f"supported in GGUF are {', '.join(ARCHITECTURES)}",
            )
        self._refuse_unknown()

    def _refuse_unknown(self) -> None:
        prefix = f"{self.architecture}."
        for key, value in self.file.metadata.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name not in _READ | _HARMLESS and value:
                raise ModelError(f"{self.file.path} has {key} {value!r:.120}, which is not supported")

    def has(self, tensor: str) -> bool:
        """Whether the file holds that tensor."""
        return tensor in self.file.tensors

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number that is sane for what it counts."""
        most = MOST[_SIZES[name]]
        return check_size(str(self.file.path), f"{self.architecture}.{name}", self.whole(name, default), most)

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number; one a layer is accepted where all are alike."""
        value = self._get(name, default)
        if isinstance(value, list):
            if not value or any(item != value[0] for item in value):
                raise ModelError(f"{self.file.path} has {self.architecture}.{name} {value!r:.80}, not one for all")
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool):
            raise ModelError(f"{self.file.path} has {self.architecture}.{name} {value!r:.80}, not a whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number."""
        value = self._get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ModelError(f"{self.file.path} has {self.architecture}.{name} {value!r:.80}, not a number")
        return float(value)

    def _get(self, name: str, default: object) -> Any:
        value = self.file.metadata.get(f"{self.architecture}.{name}", default)
        if value is None:
            raise ModelError(f"{self.file.path} lacks {self.architecture}.{name}", "convert the model again")
        return value


def _decoder(keys: _Keys) -> ModelSpec:
    num_q_heads, hidden_size = keys.size("attention.head_count"), keys.size("embedding_length")
    head_dim = keys.size("attention.key_length", hidden_size // num_q_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.whole(name, head_dim) != head_dim:
            raise ModelError(f"{keys.file.path} has {name} {keys.whole(name)} and head_dim {head_dim}: not supported")
    return ModelSpec(
        **_common(keys, hidden_size),
        num_q_heads=num_q_heads,
        num_kv_heads=keys.size("attention.head_count_kv", num_q_heads),
        head_dim=head_dim,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        scale=head_dim**-0.5,
        windows=(_window(keys),) * keys.size("block_count"),
        activation="silu",
        rope=_rope(keys, head_dim),
        qkv_bias=keys.has("blk.0.attn_q.bias"),
        output_bias=keys.has("blk.0.attn_output.bias"),
        mlp_bias=keys.has("blk.0.ffn_down.bias"),
        qk_norm=keys.architecture == "qwen3",
    )


def _gpt2(keys: _Keys) -> ModelSpec:
    num_heads, hidden_size = keys.size("attention.head_count"), keys.size("embedding_length")
    if hidden_size % num_heads:
        raise ModelError(f"{keys.file.path} has embedding_length {hidden_size}, not a multiple of {num_heads} heads")
    head_dim = hidden_size // num_heads
    return ModelSpec(
        **_common(keys, hidden_size),
        num_q_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        norm_eps=keys.number("attention.layer_norm_epsilon"),
        scale=head_dim**-0.5,
        windows=(None,) * keys.size("block_count"),
        activation="gelu_new",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def _common(keys: _Keys, hidden_size: int) -> dict[str, Any]:
    """What every architecture has under the same names."""
    embedding = keys.file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{keys.file.path} lacks the tensor token_embd.weight", "it holds no whole model")
    if len(embedding.shape) != 2:
        raise ModelError(f"{keys.file.path} has token_embd.weight of shape {list(embedding.shape)}, not a matrix")
    return {
        "architecture": keys.architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_layers": keys.size("block_count"),
        "max_position": keys.size("context_length"),
        "dtype": _dtype(keys.file),
        "eos_token_ids": _eos_token_ids(keys.file),
        "tie_word_embeddings": not keys.has("output.weight"),
    }


def _window(keys: _Keys) -> int | None:
    """Only Mistral's files, of architecture llama, are known to mean the same window in every layer."""
    window = keys.whole("attention.sliding_window", 0)
    if window and keys.architecture != "llama":
        raise ModelError(
            f"{keys.file.path} has attention.sliding_window {window}, and does not say in which layers",
            "use the model's safetensors folder",
        )
    return window or None


def _rope(keys: _Keys, head_dim: int) -> Rope:
    theta = keys.number("rope.freq_base", 10_000.0)
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    kind = keys.file.metadata.get(f"{keys.architecture}.rope.scaling.type", "linear")
    stretched = kind != "none" and factor not in (0, 1)
    if keys.has(FREQUENCY_FACTORS):
        if stretched:
            raise ModelError(f"{keys.file.path} has both {FREQUENCY_FACTORS} and {kind} rope scaling: not supported")
        return Rope(theta=theta, scaling="factors", factors=_factors(keys.file, head_dim))
    if not stretched:
        return Rope(theta=theta)
    if kind != "linear":
        raise ModelError(
            f"{keys.file.path} has {kind!r:.40} rope scaling; in GGUF linear and {FREQUENCY_FACTORS} are supported",
            "use the model's safetensors folder",
        )
    return Rope(theta=theta, scaling="linear", factor=factor)


def _factors(file: GGUFFile, head_dim: int) -> tuple[float, ...]:
    """Llama 3's scaling, as what each frequency is divided by."""
    tensor = file.tensors[FREQUENCY_FACTORS]
    if tensor.shape != (head_dim // 2,) or tensor.type_name not in FLOATS:
        raise ModelError(
            f"{file.path} has {FREQUENCY_FACTORS} of shape {list(tensor.shape)} and type {tensor.type_name}, "
            f"{head_dim // 2} floats are needed"
        )
    return tuple(dequantize(tensor.data, tensor.type).tolist())


def _dtype(file: GGUFFile) -> torch.dtype:
    """The float type of the matrices; bfloat16 where they are quantised, for its range."""
    names = {tensor.type_name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if names == {"F32"}:
        return torch.float32
    return torch.float16 if names == {"F16"} else torch.bfloat16


def _eos_token_ids(file: GGUFFile) -> tuple[int, ...]:
    values = [file.metadata.get(f"tokenizer.ggml.{name}") for name in _END_TOKENS]
    return tuple(dict.fromkeys(value for value in values if isinstance(value, int)))
