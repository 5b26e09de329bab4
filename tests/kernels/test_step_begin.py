"""What a step begins with, in a launch each, is what torch's operators give."""

from __future__ import annotations

import pytest
import torch

from triton_interpreter import (
    DEVICE,
    check_in_interpreter,
    every_dtype,
    needs_cuda,
    needs_kernels,
    outside_interpreter,
    ulps_apart,
)

pytest.importorskip("triton", reason="triton is not installed")
from tessera.kernels.sampling import sample
from tessera.kernels.step_begin import BLOCK, pending_tokens, rotations
from tessera.model.layers.rope import RotaryEmbedding
from tessera.model.spec import Rope


@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@pytest.mark.parametrize("num_tokens", [0, 1, 7, BLOCK, BLOCK + 1])
def test_pending_tokens_come_from_what_was_sampled_and_others_are_known(num_tokens: int) -> None:
    made = torch.Generator().manual_seed(num_tokens)
    token_ids = torch.randint(0, 2**31, (num_tokens,), generator=made)
    sources = torch.randint(-1, 3, (num_tokens,), generator=made)
    sampled = torch.tensor([11, 22, 2**40])
    expected = [sampled[s].item() if s >= 0 else t for t, s in zip(token_ids.tolist(), sources.tolist())]
    assert pending_tokens(token_ids.to(DEVICE), sources.to(DEVICE), sampled.to(DEVICE)).tolist() == expected


ROPES = (Rope(theta=10_000.0), Rope(theta=1e6, scaling="linear", factor=4.0), Rope(theta=5e5, attention_factor=1.3))


@needs_kernels
@every_dtype
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_rotations_equal_those_of_torch(dtype: torch.dtype, rope: Rope, head_dim: int) -> None:
    """But for the last place on a GPU; the interpreter's cosines are those of another library."""
    device = torch.device(DEVICE)
    positions = torch.tensor([0, 1, 2, 77, 4095, 131_071, 1_000_000], device=device)
    plain = RotaryEmbedding(rope, head_dim, device, fused=False)
    cosines, sines = RotaryEmbedding(rope, head_dim, device, fused=True)(positions, dtype)
    for found, expected in zip((cosines, sines), plain(positions, dtype)):
        assert found.shape == expected.shape and found.is_contiguous()
        if DEVICE == "cuda":
            assert ulps_apart(found, expected) <= (2 if dtype == torch.float32 else 1)
        else:
            assert torch.allclose(found.float(), expected.float(), rtol=0, atol=1e-6 if dtype.itemsize == 4 else 1e-3)
    assert torch.equal(cosines[..., : head_dim // 2], cosines[..., head_dim // 2 :])


@needs_kernels
def test_no_positions_have_no_rotations() -> None:
    empty = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    cosines, sines = rotations(empty, torch.ones(16, device=DEVICE), 1.0, torch.float16)
    assert (cosines.shape, sines.shape) == ((0, 1, 32), (0, 1, 16))


@needs_kernels
def test_what_is_sampled_goes_where_it_is_told() -> None:
    logits = torch.zeros(2, 50, device=DEVICE)
    logits[0, 7] = logits[1, 9] = 1.0
    parameters = torch.zeros(2, 5, dtype=torch.float64, device=DEVICE)
    there = torch.full((3,), -5, dtype=torch.int64, device=DEVICE)
    assert sample(logits, parameters, out=there[:2]).data_ptr() == there.data_ptr()
    assert there.tolist() == [7, 9, -5]


@needs_cuda
def test_a_model_on_the_gpu_takes_the_kernel() -> None:
    assert RotaryEmbedding(Rope(theta=10_000.0), 64, torch.device("cuda")).fused
