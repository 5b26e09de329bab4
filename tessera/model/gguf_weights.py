"""Weights from a GGUF file: names to transformers' names, rows to its order, quantised types to floats."""

from __future__ import annotations

from torch import Tensor
from tqdm import tqdm

from tessera.model.gguf_file import GGUFFile, GGUFTensor
from tessera.model.gguf_four_bits import keep_four_bits
from tessera.model.gguf_part import GGUFPart
from tessera.model.gguf_quants import dequantize
from tessera.model.language_model import LanguageModel
from tessera.model.slots import Slots
from tessera.model.spec import ModelSpec
from tessera.model.threads import for_each

CHUNK_WEIGHTS = 2**17
"""Weights dequantised at a time: few enough to stay in the processor's cache on their way to memory."""

FREQUENCY_FACTORS = "rope_freqs.weight"
"""Part of the spec, not of the weights."""

_DECODER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "transformer.h.{}.ln_1",
    "attn_qkv": "transformer.h.{}.attn.c_attn",
    "attn_output": "transformer.h.{}.attn.c_proj",
    "ffn_norm": "transformer.h.{}.ln_2",
    "ffn_up": "transformer.h.{}.mlp.c_fc",
    "ffn_down": "transformer.h.{}.mlp.c_proj",
}
_TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
"""GPT-2's, which transformers keep as [num_inputs, num_outputs] and GGUF does not."""
_INTERLEAVED = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")
"""Llama's, in which GGUF puts the two dimensions that turn together next to each other."""


def load_gguf(model: LanguageModel, file: GGUFFile, *, four_bits: bool = False, progress: bool) -> None:
    """Fill the model from a GGUF file; ModelError for tensors missing, unknown, misshapen or of an unknown type.

    four_bits  whether to keep weights of four bits as they are, beside the floats
    """
    slots = Slots(model)
    parts = [
        GGUFPart(place, tensor, _head_dim_to_unweave(tensor.name, model.spec))
        for tensor in file.tensors.values()
        if tensor.name != FREQUENCY_FACTORS and (place := _place(slots, tensor, file)) is not None
    ]
    slots.check_filled(file.path)
    for _ in tqdm(for_each(_fill, parts), "Loading weights", len(parts), unit="tensor", disable=not progress):
        pass
    if four_bits:
        keep_four_bits(model, parts, progress=progress)


def _place(slots: Slots, tensor: GGUFTensor, file: GGUFFile) -> Tensor | None:
    spec = slots.model.spec
    transposed = spec.architecture == "gpt2" and tensor.name.endswith(_TRANSPOSED)
    shape = tensor.shape[::-1] if transposed else tensor.shape
    place = slots.place(_checkpoint_name(tensor.name, spec), shape, file.path)
    return place.t() if transposed and place is not None else place


def _checkpoint_name(name: str, spec: ModelSpec) -> str:
    """The name in transformers of a GGUF tensor; an unknown one stays as it is and finds no place."""
    names = _GPT2 if spec.architecture == "gpt2" else _DECODER
    stem, _, kind = name.rpartition(".")
    layer = "0"
    if stem.startswith("blk."):
        _, layer, stem = stem.split(".", 2) if stem.count(".") >= 2 else ("", "0", "")
    return f"{names[stem].format(layer)}.{kind}" if stem in names else name


def _head_dim_to_unweave(name: str, spec: ModelSpec) -> int | None:
    return spec.head_dim if spec.architecture == "llama" and name.endswith(_INTERLEAVED) else None


def _fill(part: GGUFPart) -> None:
    """Dequantise a tensor into its place, some rows at a time."""
    place, tensor, unweave = part
    if place.dim() == 1:
        place.copy_(part.in_order(dequantize(tensor.data, tensor.type)[:, None])[:, 0])
        return
    num_rows, num_columns = place.shape
    row_bytes = tensor.num_bytes // num_rows
    step = unweave or 1
    chunk_rows = max(1, CHUNK_WEIGHTS // (num_columns * step)) * step
    data = tensor.data
    for start in range(0, num_rows, chunk_rows):
        end = min(start + chunk_rows, num_rows)
        rows = dequantize(data[start * row_bytes : end * row_bytes], tensor.type).view(-1, num_columns)
        place[start:end].copy_(part.in_order(rows))
