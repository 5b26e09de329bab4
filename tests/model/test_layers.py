from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tessera.model.layers.embedding import Embedding, Head
from tessera.model.layers.linear import Linear, packs
from tessera.model.layers.norm import RMSNorm
from tessera.model.layers.parameter import Placement
from tessera.model.layers.rope import RotaryEmbedding, rotate
from tessera.model.spec import Rope

FP32 = Placement(torch.float32, torch.device("cpu"))


def _linear(num_inputs: int, num_outputs: int, *, bias: bool, placement: Placement = FP32) -> Linear:
    linear = Linear(num_inputs, num_outputs, bias=bias, placement=placement)
    for parameter in linear.parameters():
        parameter.normal_()
    return linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 33, 300])
def test_prepared_linear_computes_the_same_product(num_rows: int, bias: bool) -> None:
    linear = _linear(70, 130, bias=bias)
    hidden = torch.randn(num_rows, 70)
    expected = linear(hidden)
    linear.prepare()
    torch.testing.assert_close(linear(hidden), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype", "most"),
    [
        (1024, 2048, torch.bfloat16, 256),  # 4 MiB
        (4096, 1024, torch.bfloat16, 64),  # 8 MiB
        (4096, 1024, torch.float32, 16),  # 16 MiB
        (4097, 2048, torch.bfloat16, 2),  # more than 16 MiB
    ],
)
def test_how_many_tokens_go_to_the_kernel_for_few_follows_the_size_of_the_weight(
    outputs: int, inputs: int, dtype: torch.dtype, most: int
) -> None:
    layer = Linear(inputs, outputs, bias=False, placement=Placement(dtype, torch.device("meta")))
    assert [tokens for tokens in range(300) if layer.serves_small(tokens)] == list(range(1, most + 1))


@pytest.mark.skipif(not packs(torch.float32, torch.device("cpu")), reason="this torch has no oneDNN")
def test_prepared_linear_lets_go_of_its_weight() -> None:
    linear = _linear(8, 4, bias=False)
    linear.prepare()
    assert linear.weight.numel() == 0
    assert linear.packed is not None
    packed = linear.packed
    linear.prepare()
    assert linear.packed is packed


def test_types_that_the_processor_cannot_multiply_are_not_packed() -> None:
    linear = _linear(8, 4, bias=True, placement=Placement(torch.float16, torch.device("cpu")))
    linear.prepare()
    assert linear.packed is None


@pytest.mark.skipif(not packs(torch.bfloat16, torch.device("cpu")), reason="this processor does not multiply bfloat16")
def test_packed_bfloat16_gives_the_product_of_the_unpacked() -> None:
    linear = _linear(64, 48, bias=True, placement=Placement(torch.bfloat16, torch.device("cpu")))
    hidden = torch.randn(5, 64, dtype=torch.bfloat16)
    expected = linear(hidden)
    linear.prepare()
    assert linear.packed is not None
    torch.testing.assert_close(linear(hidden), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_leading_logits_of_half_types_are_not_rounded_to_them(tied: bool) -> None:
    """20.0625 and 20.09 are one number in bfloat16: the second must still win."""
    placement = Placement(torch.bfloat16, torch.device("cpu"))
    embedding = Embedding(100, 2, placement)
    embedding.weight.zero_()
    head = Head(embedding, tied=tied, placement=placement)
    head.weight.copy_(torch.zeros(100, 2))
    head.weight[7], head.weight[3] = torch.tensor([20.0, 0.09375]), torch.tensor([20.0, 0.0625])
    hidden = torch.ones(1, 2, dtype=torch.bfloat16)
    for _ in range(2):
        logits = head(hidden)
        assert logits.dtype == torch.float32
        assert logits[0, 7] == 20.09375 and logits[0, 3] == 20.0625
        head.prepare()


def test_tied_head_shares_the_embedding_and_leaves_it_for_lookup() -> None:
    embedding = Embedding(11, 6, FP32)
    embedding.weight.normal_()
    head = Head(embedding, tied=True, placement=FP32)
    assert head.weight is embedding.weight
    hidden = torch.randn(3, 6)
    expected = functional.linear(hidden, embedding.weight)
    head.prepare()
    torch.testing.assert_close(head(hidden), expected)
    assert torch.equal(embedding(torch.tensor([4])), embedding.weight[4:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_computed_in_fp32(dtype: torch.dtype) -> None:
    norm = RMSNorm(32, 1e-5, Placement(dtype, torch.device("cpu")))
    norm.weight.normal_()
    hidden = (torch.randn(5, 32) * 300).to(dtype)  # squares of such values overflow float16 and blur bfloat16
    exact = hidden.double() / (hidden.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(hidden).double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_rotation_turns_each_half_pair_by_its_angle() -> None:
    rope = RotaryEmbedding(Rope(theta=100.0), 4, torch.device("cpu"))
    heads = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    turned = rotate(heads, rope(torch.tensor([3]), torch.float32))
    slow = torch.tensor(3 / 10)
    fast = torch.tensor(3.0)
    expected = torch.stack([fast.cos(), -2 * slow.sin(), fast.sin(), 2 * slow.cos()])
    torch.testing.assert_close(turned[0, 0], expected)


def test_a_position_turns_alike_whatever_else_is_in_the_step() -> None:
    rope = RotaryEmbedding(Rope(theta=10_000.0), 64, torch.device("cpu"))
    heads = torch.randn(301, 3, 64)
    positions = torch.randint(0, 100_000, (301,))
    together = rotate(heads, rope(positions, torch.float32))
    for index in (0, 7, 300):
        alone = rotate(heads[index : index + 1], rope(positions[index : index + 1], torch.float32))
        assert torch.equal(alone[0], together[index])
