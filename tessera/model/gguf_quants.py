"""ggml's quantised types back to float32, whole tensors at a time; the same bits as gguf.quants gives.

The layouts are ggml's (ggml-common.h, ggml-quants.c). A group is the unit that shares its scales: 32 weights
in the plain types, 256 in the K types, there in 8 or 16 parts with scales of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tessera.errors import ModelError
from tessera.model.gguf_file import TENSOR_TYPES


def dequantize(raw: Tensor, type_number: int) -> Tensor:
    """The weights of whole groups.

    raw      [groups * group_bytes] uint8
    returns  [groups * group_weights] float32

    Raises ModelError for a type that cannot be read.
    """
    name, _, group_bytes = TENSOR_TYPES[type_number]
    if name in FLOATS:
        return raw.view(FLOATS[name]).float()
    if name in QUANTS:
        return QUANTS[name](raw.view(-1, group_bytes)).flatten()
    return _by_gguf(raw, type_number)


def split_four_bits(raw: Tensor, type_number: int) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of whole groups of one of the types FOUR_BITS: weight = (number - 8) * scale + offset.

    raw      [groups * group_bytes] uint8
    returns  numbers [groups * group_weights] uint8, 0 to 15; scales and offsets [groups * group_weights / 32] float32
    """
    name, _, group_bytes = TENSOR_TYPES[type_number]
    groups = raw.view(-1, group_bytes)
    if name == "Q4_K":
        scales, minima = (each.flatten() for each in _scales_and_minima(groups))
        return _nibbles(groups[:, FOUR_BITS[name] :], 32).flatten(), scales, 8 * scales - minima
    scales = _half(groups, 0)
    offsets = _half(groups, 2) + 8 * scales if name == "Q4_1" else torch.zeros_like(scales)
    return _nibbles(groups[:, FOUR_BITS[name] :], 16).flatten(), scales.flatten(), offsets.flatten()


def _by_gguf(raw: Tensor, type_number: int) -> Tensor:
    """The rare types, by the gguf package: correct, and slow."""
    import gguf

    try:
        values = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(type_number))
        return torch.from_numpy(values).float().flatten()
    except (NotImplementedError, ValueError, TypeError):
        name = TENSOR_TYPES[type_number][0]
        raise ModelError(
            f"GGUF tensors of type {name} cannot be read", "use a file quantised as Q4_K_M, Q8_0 or F16"
        ) from None


def _half(groups: Tensor, start: int) -> Tensor:
    """[groups, 1] float32: the float16 at byte `start` of each group."""
    return groups[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, size: int) -> Tensor:
    """Low halves of each `size` bytes, then their high halves: [groups, bytes] -> [groups, 2 * bytes] uint8."""
    parts = packed.reshape(packed.shape[0], -1, 1, size)
    return torch.cat((parts & 15, parts >> 4), 2).flatten(1)


def _bits(packed: Tensor, width: int, size: int) -> Tensor:
    """Unpack fields of `width` bits: for each `size` bytes first all the lowest fields, then the next."""
    parts = packed.reshape(packed.shape[0], -1, 1, size)
    mask = (1 << width) - 1
    return torch.cat([(parts >> shift) & mask for shift in range(0, 8, width)], 2).flatten(1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """[groups, 4] -> [groups, 32]: bit i of the 32, moved to the place of 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[:, :, None] >> shifts) & 1).flatten(1) << 4


def _signed(values: Tensor, offset: int) -> Tensor:
    return (values.view(torch.int8) - offset).float()


def _q4_0(groups: Tensor) -> Tensor:
    return _signed(_nibbles(groups[:, 2:], 16), 8) * _half(groups, 0)


def _q4_1(groups: Tensor) -> Tensor:
    return _nibbles(groups[:, 4:], 16).float().mul_(_half(groups, 0)).add_(_half(groups, 2))


def _q5_0(groups: Tensor) -> Tensor:
    values = _nibbles(groups[:, 6:], 16) | _fifth_bits(groups[:, 2:6])
    return _signed(values, 16) * _half(groups, 0)


def _q5_1(groups: Tensor) -> Tensor:
    values = _nibbles(groups[:, 8:], 16) | _fifth_bits(groups[:, 4:8])
    return values.float().mul_(_half(groups, 0)).add_(_half(groups, 2))


def _q8_0(groups: Tensor) -> Tensor:
    return groups[:, 2:].view(torch.int8).float().mul_(_half(groups, 0))


def _q2_k(groups: Tensor) -> Tensor:
    scales = _half(groups, 80) * (groups[:, :16] & 15)
    minima = _half(groups, 82) * (groups[:, :16] >> 4)
    values = _bits(groups[:, 16:80], 2, 32).view(-1, 16, 16)
    return (scales[:, :, None] * values - minima[:, :, None]).flatten(1)


def _q3_k(groups: Tensor) -> Tensor:
    low = _nibbles(groups[:, 96:104], 8)
    high = _bits(groups[:, 104:108], 2, 4)
    scales = _half(groups, 108) * _signed(low | (high << 4), 32)
    # A set bit in the mask means that 4 is not taken off.
    taken = (_bits(groups[:, :32], 1, 32) ^ 1) << 2
    values = _bits(groups[:, 32:96], 2, 32).view(torch.int8) - taken.view(torch.int8)
    return (scales[:, :, None] * values.view(-1, 16, 16)).flatten(1)


def _scales_and_minima(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K's and Q5_K's eight 6-bit scales and minima out of bytes 4 to 16: [groups, 8, 1] float32 each."""
    first, second, third = groups[:, 4:8], groups[:, 8:12], groups[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), 1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), 1)
    return (_half(groups, 0) * scales)[:, :, None], (_half(groups, 2) * minima)[:, :, None]


def _q4_k(groups: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(groups)
    values = _nibbles(groups[:, 16:], 32).view(-1, 8, 32)
    return (scales * values).sub_(minima).flatten(1)


def _q5_k(groups: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(groups)
    values = _nibbles(groups[:, 48:], 32) | (_bits(groups[:, 16:48], 1, 32) << 4)
    return (scales * values.view(-1, 8, 32)).sub_(minima).flatten(1)


def _q6_k(groups: Tensor) -> Tensor:
    scales = _half(groups, 208) * groups[:, 192:208].view(torch.int8)
    values = _nibbles(groups[:, :128], 64) | (_bits(groups[:, 128:192], 2, 32) << 4)
    return (scales[:, :, None] * _signed(values, 32).view(-1, 16, 16)).flatten(1)


FOUR_BITS = {"Q4_0": 2, "Q4_1": 4, "Q4_K": 16}
"""Types whose weights are numbers of four bits, with a scale and an offset for each 32; the byte of a group at which
the numbers begin."""

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""ggml's plain float types."""

QUANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""Name of a type -> [groups, group_bytes] uint8 to [groups, group_weights] float32."""
