"""A GGUF model as a Hugging Face folder, so that engines that read no GGUF file run the same weights as we do.

They are dequantised there as here; that we multiply steps of few tokens by what they were made of is ours alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tessera.config import ModelConfig
from tessera.errors import ModelError
from tessera.model.registry import load_spec
from tessera.model.source import ModelSource
from tessera.model.spec import ModelSpec


def folder_of(source: ModelSource, dtype: torch.dtype, scratch: Path) -> Path:
    """The model's own folder, or one made in `scratch` with config, weights in `dtype` and tokenizer.

    ModelError for a GGUF file of another architecture than Llama's, whose config is not written here.
    """
    if source.kind == "folder":
        return source.path
    folder = scratch / f"{source.name}-{str(dtype).removeprefix('torch.')}"
    if not (folder / "model.safetensors").exists():
        _write(source, load_spec(source), dtype, folder)
    return folder


def _write(source: ModelSource, spec: ModelSpec, dtype: torch.dtype, folder: Path) -> None:
    from safetensors.torch import save_file

    from tessera.model.gguf_file import GGUFFile
    from tessera.model.gguf_weights import load_gguf
    from tessera.model.layers.parameter import Placement
    from tessera.model.llama import Llama
    from tessera.text.tokenizer import load_tokenizer

    config = _config(source, spec, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(False), torch.no_grad():
        model = Llama(spec, Placement(dtype, torch.device("cpu")))
        load_gguf(model, GGUFFile(source.path), progress=False)
        weights = {name: tensor.detach().contiguous().clone() for name, tensor in model.slots().items()}
    if spec.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    tokenizer = load_tokenizer(source, ModelConfig())
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, **tokenizer.special_tokens}
    if tokenizer.template is not None:
        about["chat_template"] = tokenizer.template.source
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _config(source: ModelSource, spec: ModelSpec, dtype: torch.dtype) -> dict[str, object]:
    if spec.architecture != "llama" or spec.rope is None or spec.rope.scaling != "default":
        raise ModelError(
            f"{source.name}: only plain Llama models are written out of a GGUF file, this is {spec.architecture}",
            "give --model the Hugging Face folder it was made from",
        )
    eos = list(spec.eos_token_ids)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_q_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": spec.activation,
        "max_position_embeddings": spec.max_position,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope.theta},
        "tie_word_embeddings": spec.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "dtype": str(dtype).removeprefix("torch."),
    }
