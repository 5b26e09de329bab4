from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tessera.errors import ModelError
from tessera.model.gguf_file import TENSOR_TYPES
from tessera.model.gguf_quants import FOUR_BITS, QUANTS, dequantize, split_four_bits

NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
"""Where a group has its float16 scales: random bytes there could be infinite."""


def _random_groups(name: str, count: int) -> np.ndarray[Any, Any]:
    group_bytes = TENSOR_TYPES[NUMBERS[name]][2]
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 256, (count, group_bytes), dtype=np.uint8)
    for start in HALVES[name]:
        groups[:, start : start + 2] = generator.normal(0, 0.1, (count, 1)).astype(np.float16).view(np.uint8)
    return groups


@pytest.mark.parametrize("name", HALVES)
def test_random_groups_dequantise_to_the_same_bits_as_gguf(name: str) -> None:
    groups = _random_groups(name, 257)
    expected = gguf.quants.dequantize(groups.reshape(-1), gguf.GGMLQuantizationType(NUMBERS[name]))
    values = dequantize(torch.from_numpy(groups.reshape(-1)), NUMBERS[name])
    assert values.dtype == torch.float32
    assert np.array_equal(values.numpy().view(np.uint32), expected.reshape(-1).astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("name", FOUR_BITS)
def test_weights_of_four_bits_are_numbers_with_a_scale_and_an_offset_for_each_32(name: str) -> None:
    raw = torch.from_numpy(_random_groups(name, 257).reshape(-1))
    numbers, scales, offsets = split_four_bits(raw, NUMBERS[name])
    assert numbers.dtype == torch.uint8 and numbers.min() == 0 and numbers.max() == 15
    weights = (numbers.view(-1, 32).float() - 8) * scales[:, None] + offsets[:, None]
    torch.testing.assert_close(weights.flatten(), dequantize(raw, NUMBERS[name]), atol=1e-5, rtol=1e-5)


def test_every_quantised_type_of_ours_is_checked() -> None:
    assert set(QUANTS) <= set(HALVES)


@pytest.mark.parametrize(("name", "dtype"), [("F32", np.float32), ("F16", np.float16), ("F64", np.float64)])
def test_plain_floats_are_taken_as_they_are(name: str, dtype: type) -> None:
    values: np.ndarray[Any, Any] = np.array([0.5, -3.25, 1e-3], dtype)
    raw = torch.from_numpy(values.view(np.uint8).copy())
    assert np.array_equal(dequantize(raw, NUMBERS[name]).numpy(), values.astype(np.float32))


def test_bfloat16_is_taken_as_it_is() -> None:
    values = torch.tensor([0.5, -3.25, 1e-3], dtype=torch.bfloat16)
    assert torch.equal(dequantize(values.view(torch.uint8), NUMBERS["BF16"]), values.float())


@pytest.mark.parametrize("name", ["I32", "Q8_1"])
def test_type_that_nobody_dequantises_is_refused(name: str) -> None:
    raw = torch.zeros(TENSOR_TYPES[NUMBERS[name]][2], dtype=torch.uint8)
    with pytest.raises(ModelError, match=f"type {name} cannot be read"):
        dequantize(raw, NUMBERS[name])
