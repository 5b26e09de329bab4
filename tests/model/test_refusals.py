"""What a folder may hold that is not computed, or not sound: one sentence each, never an approximation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessera.errors import ModelError
from tessera.model.registry import load_model, load_spec
from tessera.model.source import ModelSource
from tiny_models import make_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}

CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown family": ("llama", {"model_type": "mamba2"}, "'mamba2' is not supported"),
    "no family": ("llama", {"model_type": None}, "has no model_type"),
    "code": ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "never run"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config .*'bits': 4"),
    "classifier": ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "none of which generates text"),
    "softcap": ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    "final softcap": ("qwen2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    "experts": ("qwen3", {"num_experts": 8}, "num_experts 8"),
    "sinks": ("llama", {"attention_sinks": True}, "attention_sinks True"),
    "multiplier": ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier 12.0"),
    "window on llama": ("llama", {"sliding_window": 4096}, "sliding_window 4096"),
    "layer types on mistral": ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    "interleaved rope": ("llama", {"rope_interleaved": True}, "rope_interleaved True"),
    "alibi": ("gpt2", {"alibi": True}, "alibi True"),
    "positions": ("gpt2", {"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
    "inverse layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    "upcast": ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn True"),
    "cross attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
    "activation": ("llama", {"hidden_act": "relu6"}, "hidden_act 'relu6'"),
    "gpt2 activation": ("gpt2", {"activation_function": "quick_gelu"}, "activation_function 'quick_gelu'"),
    "dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    "old longrope": ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
    "multimodal rope": (
        "qwen2",
        {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}},
        r"mrope_section \[2, 2, 2\]",
    ),
    "partial rotary": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "llama3 without its factors": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
        "low_freq_factor",
    ),
    "yarn of size zero": ("llama", {"rope_parameters": YARN | {"factor": -1.0}}, "factor is -1.0"),
    "window never used": ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "no sliding_window in use"),
    "layer type": (
        "qwen3",
        {"layer_types": ["chunked_attention"] + ["full_attention"] * 2},
        "layer_types|chunked_attention",
    ),
    "heads": ("llama", {"num_key_value_heads": 3}, "4 query heads cannot share 3"),
    "size": ("llama", {"hidden_size": -48}, "hidden_size -48, which is not from 1 to"),
    "not a number": ("llama", {"num_hidden_layers": "three"}, "num_hidden_layers 'three', not a whole number"),
    "odd head": ("llama", {"head_dim": 3}, "head_dim 3 is odd"),
    "dtype": ("llama", {"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
    "end token": ("llama", {"eos_token_id": "</s>"}, "eos_token_id"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_is_not_computed_is_refused(case: str, folder: Path, source: ModelSource) -> None:
    family, changes, sentence = CONFIGS[case]
    make_model(family, folder)
    _change_config(folder, changes)
    with pytest.raises(ModelError, match=sentence):
        load_spec(source)


HARMLESS: dict[str, dict[str, Any]] = {
    "llama": {
        "attention_dropout": 0.1,
        "rope_interleaved": False,
        "is_llama_config": True,
        "pretraining_tp": 1,
        "use_flash_attn": True,
        "logits_scaling": 1.0,
        "num_experts": 0,
        "mlp_bias": False,
        "sliding_window": None,
    },
    "qwen2": {"use_mrope": False, "attention_bias": True, "use_sliding_window": False, "sliding_window": 32768},
    "gpt2": {"n_ctx": 256, "summary_type": "cls_index", "attn_pdrop": 0.1, "position_embedding_type": "absolute"},
}


@pytest.mark.parametrize("family", HARMLESS)
def test_config_keys_that_change_nothing_are_taken(family: str, folder: Path, source: ModelSource) -> None:
    make_model(family, folder)
    before = load_spec(source)
    _change_config(folder, HARMLESS[family])
    assert load_spec(source) == before


def test_folder_without_config_is_refused_and_names_the_gguf_in_it(tmp_path: Path) -> None:
    (tmp_path / "model.Q4_0.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"has no config\.json[\s\S]*--model .*model\.Q4_0\.gguf"):
        load_spec(ModelSource("folder", tmp_path, "x"))


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_spec(ModelSource("folder", tmp_path / "nowhere", "x"))


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00\xff"])
def test_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        load_spec(ModelSource("folder", tmp_path, "x"))


def test_folder_without_weights_is_refused(folder: Path, source: ModelSource) -> None:
    make_model("llama", folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no safetensors file"):
        _load(source)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a format that can run code"):
        _load(source)


def test_missing_shard_is_named(folder: Path, source: ModelSource) -> None:
    make_model("llama", folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    _load(source)
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"lacks 1 of {len(shards)} shards: {shards[1].name}"):
        _load(source)


def test_index_may_not_lead_out_of_the_folder(folder: Path, source: ModelSource) -> None:
    make_model("llama", folder)
    index = {"weight_map": {"lm_head.weight": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not a safetensors file beside it"):
        _load(source)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_safetensors_is_named(share: float, folder: Path, source: ModelSource) -> None:
    make_model("llama", folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a sound safetensors file"):
        _load(source)


def test_missing_tensors_are_counted_and_named(folder: Path, source: ModelSource) -> None:
    make_model("llama", folder)
    gone = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)] + ["model.norm.weight"]
    _change_weights(folder, leave_out=gone)
    with pytest.raises(ModelError, match=r"lacks 4 of 30 tensors: model\.norm\.weight, .*\.\.\."):
        _load(source)


EXTRA = ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight", "score.weight"]


@pytest.mark.parametrize("name", EXTRA)
def test_tensor_that_would_be_dropped_is_refused(name: str, folder: Path, source: ModelSource) -> None:
    make_model("llama", folder)
    _change_weights(folder, {name: torch.ones(48)})
    with pytest.raises(ModelError, match=f"{name}.*has no place"):
        _load(source)


def test_tables_that_older_checkpoints_saved_are_passed_over(tmp_path: Path) -> None:
    for family, name in (("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"), ("gpt2", "h.0.attn.bias")):
        make_model(family, tmp_path / family)
        _change_weights(tmp_path / family, {name: torch.ones(1, 1, 4, 4, dtype=torch.bool).float()})
        _load(ModelSource("folder", tmp_path / family, family))


def test_gpt2_weights_without_prefix_are_found(folder: Path, source: ModelSource) -> None:
    make_model("gpt2", folder)
    path = folder / "model.safetensors"
    save_file({name.removeprefix("transformer."): value for name, value in load_file(path).items()}, path)
    _load(source)


def test_wrong_shape_is_refused_with_both(folder: Path, source: ModelSource) -> None:
    make_model("llama", folder)
    _change_weights(folder, {"model.layers.1.self_attn.k_proj.weight": torch.ones(48, 24)})
    with pytest.raises(ModelError, match=r"k_proj.*shape \[48, 24\], the model needs \[24, 48\]"):
        _load(source)


def test_quantised_tensor_is_refused(folder: Path, source: ModelSource) -> None:
    make_model("llama", folder)
    _change_weights(folder, {"model.layers.1.self_attn.k_proj.weight": torch.ones(24, 48, dtype=torch.int8)})
    with pytest.raises(ModelError, match="is int8, and quantised weights"):
        _load(source)


def test_tied_head_that_differs_is_refused_and_the_same_one_taken(folder: Path, source: ModelSource) -> None:
    make_model("llama", folder, tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    _change_weights(folder, {"lm_head.weight": embedding.clone()})
    _load(source)
    _change_weights(folder, {"lm_head.weight": embedding + 1})
    with pytest.raises(ModelError, match="differs from the embedding"):
        _load(source)


def _load(source: ModelSource) -> None:
    load_model(load_spec(source), source, dtype=torch.float32, device=torch.device("cpu"))


def _change_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "generation_config.json").unlink(missing_ok=True)


def _change_weights(folder: Path, add: dict[str, Any] | None = None, leave_out: list[str] | None = None) -> None:
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items() if name not in (leave_out or [])}
    save_file(tensors | (add or {}), path, metadata={"format": "pt"})
