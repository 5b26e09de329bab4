"""The 4-bit weights of a GGUF file, kept as they are beside the floats made of them: see `layers/four_bits.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tessera.model.gguf_file import GGUFFile, GGUFTensor
from tessera.model.gguf_part import GGUFPart
from tessera.model.gguf_quants import FOUR_BITS, split_four_bits
from tessera.model.language_model import LanguageModel
from tessera.model.layers.four_bits import BLOCK, GROUP, FourBits, fits, processor_refused
from tessera.model.layers.linear import Linear, packs
from tessera.model.source import ModelSource
from tessera.model.threads import for_each

_AT_A_TIME = 2**20
"""Weights that are packed at a time, in each thread."""


class FourBitsFound(NamedTuple):
    """What 4-bit weights there are to be kept."""

    num_bytes: int
    """Memory that they take at most; 0: there are none, or they cannot be multiplied."""
    refused: str = ""
    """Why that is so."""


def find_four_bits(source: ModelSource, *, random: bool, dtype: torch.dtype, device: torch.device) -> FourBitsFound:
    """The 4-bit weights of a model that products on `device` can be made of.

    random  whether weights are made up, whatever the file holds
    """
    if device.type != "cpu":
        return FourBitsFound(0, f"the device is {device.type}")
    if dtype is not torch.bfloat16:
        return FourBitsFound(0, f"they are for bfloat16 alone, and the dtype is {str(dtype).removeprefix('torch.')}")
    if not packs(dtype, device):
        return FourBitsFound(0, "torch multiplies no bfloat16 on this processor")
    if refused := processor_refused():
        return FourBitsFound(0, refused)
    if random or source.kind != "gguf":
        return FourBitsFound(0, "the weights are random" if random else f"{source.name} is no GGUF file")
    sizes = [tensor.shape for tensor in GGUFFile(source.path).tensors.values() if _may_be_kept(tensor)]
    num_bytes = sum(rows * columns // GROUP * (GROUP // 2 + 4) for rows, columns in sizes)
    return FourBitsFound(num_bytes, "" if num_bytes else f"no layer of {source.name} is of {' or '.join(FOUR_BITS)}")


def keep_four_bits(model: LanguageModel, parts: Sequence[GGUFPart], *, progress: bool) -> None:
    """Give linear layers all of whose weight the file has in 4 bits `Linear.four_bits`; before `prepare` only."""
    linears = {
        each.weight.untyped_storage().data_ptr(): each
        for each in model.modules()
        if type(each) is Linear and fits(*each.weight.shape)  # no head, whose logits have to be more exact
    }
    parts_of: dict[Linear, list[GGUFPart]] = {}
    for part in parts:
        linear = linears.get(part.place.untyped_storage().data_ptr())
        if linear is not None and part.place.dim() == 2:
            parts_of.setdefault(linear, []).append(part)
    whole = [linear for linear, of_it in parts_of.items() if all(_may_be_kept(part.tensor) for part in of_it)]
    packing = for_each(lambda linear: _keep(linear, parts_of[linear]), whole)
    for _ in tqdm(packing, "Packing 4-bit weights", len(whole), unit="layer", disable=not progress):
        pass


def _keep(linear: Linear, parts: list[GGUFPart]) -> None:
    """Parts fill whole rows of the weight, each once."""
    num_rows, num_columns = linear.weight.shape
    kept, step = FourBits(num_rows, num_columns), max(BLOCK, _AT_A_TIME // num_columns // BLOCK * BLOCK)
    firsts = sorted(((part.place.storage_offset() // num_columns, part) for part in parts), key=lambda item: item[0])
    for start in range(0, num_rows, step):
        rows = [
            _rows(part, max(start - first, 0), min(start + step - first, len(part.place)))
            for first, part in firsts
            if first < start + step and start < first + len(part.place)
        ]
        kept.fill(start, *(torch.cat(each) for each in zip(*rows)))
    linear.four_bits = kept


def _rows(part: GGUFPart, start: int, end: int) -> list[Tensor]:
    """Numbers, scales and offsets of rows start .. end of a part, each [rows, n]."""
    return [each.view(end - start, -1) for each in split_four_bits(part.raw_rows(start, end), part.tensor.type)]


def _may_be_kept(tensor: GGUFTensor) -> bool:
    """Whether a tensor is of a layer, and in 4 bits."""
    return tensor.type_name in FOUR_BITS and len(tensor.shape) == 2 and tensor.name.startswith("blk.")
