"""From a model on disk to a model in memory: the one place that knows every family and every file format."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from tessera.model.dummy import fill_randomly
from tessera.model.gguf_file import GGUFFile
from tessera.model.gguf_weights import load_gguf
from tessera.model.gpt2 import GPT2
from tessera.model.language_model import LanguageModel
from tessera.model.layers.linear import packs
from tessera.model.layers.parameter import Placement
from tessera.model.llama import Llama
from tessera.model.source import ModelSource
from tessera.model.spec import ModelSpec
from tessera.model.spec_gguf import spec_from_gguf
from tessera.model.spec_hf import spec_from_folder
from tessera.model.weights import find_shards, load_safetensors

FAMILIES: dict[str, type[Llama] | type[GPT2]] = {
    "llama": Llama,
    "mistral": Llama,
    "qwen2": Llama,
    "qwen3": Llama,
    "gpt2": GPT2,
}
"""Hugging Face's model_type -> the class that computes it."""


def load_spec(source: ModelSource) -> ModelSpec:
    """What the model is, read from its config.json or GGUF metadata; ModelError where it is not supported."""
    if source.kind == "gguf":
        return spec_from_gguf(GGUFFile(source.path))
    return spec_from_folder(source.path)


def check_model(source: ModelSource, *, load_format: Literal["auto", "dummy"] = "auto") -> None:
    """ModelError, before any weight is read, where the model is not supported or lacks weights that it needs."""
    load_spec(source)
    if source.kind == "folder" and load_format != "dummy" and not source.random:
        find_shards(source.path)


def load_model(
    spec: ModelSpec,
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: Literal["auto", "dummy"] = "auto",
    seed: int = 0,
    four_bits: bool = False,
    progress: bool = False,
) -> LanguageModel:
    """The model with its weights on `device`, ready to compute; ModelError where the weights are not sound.

    four_bits  whether steps of few tokens are multiplied by the file's own; only where `find_four_bits` finds some
    """
    with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be filled in other threads
        model = FAMILIES[spec.architecture](spec, Placement(dtype, device))
        if load_format == "dummy" or source.random:
            fill_randomly(model, seed)
        elif source.kind == "gguf":
            load_gguf(model, GGUFFile(source.path), four_bits=four_bits, progress=progress)
        else:
            load_safetensors(model, source.path, progress=progress)
        model.prepare()
    return model.train(False)


def num_weight_bytes(spec: ModelSpec, dtype: torch.dtype, device: torch.device | None = None) -> int:
    """Memory that the weights take on `device` (a CPU where left out), before any is allocated."""
    model = FAMILIES[spec.architecture](spec, Placement(dtype, torch.device("meta")))
    total = sum(_num_bytes(parameter) for parameter in model.parameters())
    twice = spec.tie_word_embeddings or dtype != torch.float32  # see Head
    packed_again = twice and packs(dtype, device or torch.device("cpu"))
    return total + (_num_bytes(model.embedding.weight) if packed_again else 0)


def _num_bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()
