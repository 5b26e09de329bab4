"""Layers by fused kernels answer as layers by torch's operators, and which it is was decided when they were made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessera.attention.backends.naive import Naive
from tessera.attention.contract import Phase, Shape
from tessera.attention.step import Attention, StepAttention
from tessera.attention.workloads import make_batch
from tessera.kernels import fused
from tessera.model.language_model import LanguageModel
from tessera.model.layers import linear
from tessera.model.layers.mlp import GatedMLP
from tessera.model.layers.norm import RMSNorm
from tessera.model.layers.parameter import Placement
from tessera.model.llama import Llama
from tessera.model.spec import ModelSpec, Rope
from triton_interpreter import (
    DEVICE,
    MISSING,
    TWO_DTYPES,
    check_in_interpreter,
    needs_cuda,
    needs_kernels,
    outside_interpreter,
)

DECODE = ((1, 7), (1, 33))
PREFILLS: dict[str, tuple[tuple[int, int], ...]] = {
    "2": (),
    "3": ((1, 9),),
    "10": ((5, 5), (3, 19)),
    "20": ((15, 15), (3, 19)),
}
"""Prompts behind the decodes, (new tokens, tokens held), by the tokens of the whole step, to which one of padding is
added: 17 and more are not small."""
TABLE = torch.tensor([[3, 0, 0], [5, 1, 0], [7, 0, 0], [2, 4, 6]], dtype=torch.int32)
FUSABLE = ("llama", "layers.mlp", "layers.attention", "layers.norm", "layers.rope")
"""Modules that ask `fused_on`."""
ASKED = {(name, True) for name in ("LlamaLayer", "Attention", "GatedMLP", "RMSNorm", "RotaryEmbedding")}
"""Layers as they are made where kernels run."""


def make_spec(*, qk_norm: bool = False, bias: bool = False, activation: str = "silu") -> ModelSpec:
    return ModelSpec(
        architecture="llama",
        vocab_size=64,
        hidden_size=48,
        intermediate_size=40,
        num_layers=2,
        num_q_heads=6,
        num_kv_heads=2,
        head_dim=16,
        max_position=64,
        norm_eps=1e-6,
        dtype=torch.float32,
        scale=0.25,
        windows=(None, 8),
        eos_token_ids=(3,),
        tie_word_embeddings=True,
        activation=activation,
        rope=Rope(theta=100.0),
        qk_norm=qk_norm,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


def make_model(spec: ModelSpec, dtype: torch.dtype, *, fused: bool | None = None) -> LanguageModel:
    """The same weights every time."""
    model = Llama(spec, Placement(dtype, torch.device(DEVICE)), fused=fused)
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.copy_(values * 0.15 if parameter.dim() > 1 else values * 0.3 + 1)
    return model


def make_step(
    spec: ModelSpec, dtype: torch.dtype, *, fused: bool, tokens: str = "10"
) -> tuple[StepAttention, Tensor, list[Tensor]]:
    """A step with a token of padding, the tokens' positions, and its pools."""
    prefill = PREFILLS[tokens]
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
    sizes = (spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.scale)
    shapes = [Shape(*sizes, dtype, DEVICE, capability, 16, window) for window in spec.windows]
    backends = {phase: [Naive(phase, shape) for shape in shapes] for phase in (Phase.PREFILL, Phase.DECODE)}
    generator = torch.Generator().manual_seed(0)
    pools = [torch.randn(8, 16, 2, 16, generator=generator).to(DEVICE, dtype) for _ in range(4)]
    batches = {Phase.DECODE: (slice(0, 2), make_batch(DECODE, TABLE[:2], 8, DEVICE))}
    if prefill:
        batches[Phase.PREFILL] = (slice(2, int(tokens)), make_batch(prefill, TABLE[2:], 8, DEVICE))
    positions = [
        (row, kv_len - q_len + i) for row, (q_len, kv_len) in enumerate(DECODE + prefill) for i in range(q_len)
    ]
    slots = torch.tensor([int(TABLE[row, at // 16]) * 16 + at % 16 for row, at in positions] + [-1], device=DEVICE)
    attention = Attention(backends, [0, 1], fused=fused)
    step = attention.begin_step(pools[:2], pools[2:], slots, batches)
    return step, torch.tensor([at for _, at in positions] + [0], device=DEVICE), pools


def answers_of(
    spec: ModelSpec, dtype: torch.dtype, *, fused: bool, tokens: str, prepare: bool = False
) -> tuple[Tensor, Tensor]:
    """A model's answer to a step, without the padding, and the pools as it leaves them."""
    model = make_model(spec, dtype, fused=fused)
    assert flags(model) == {fused} or spec.activation != "silu"
    if prepare:
        model.prepare()
    step, positions, pools = make_step(spec, dtype, fused=fused, tokens=tokens)
    token_ids = torch.arange(int(tokens) + 1, device=DEVICE) * 3
    return model(token_ids, positions, step)[:-1], torch.stack(pools)


def count_small(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that are multiplied in small launches from now on."""
    shapes: list[tuple[int, ...]] = []

    from tessera.kernels.small_linear import small_linear

    def counted(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
        shapes.append(tuple(weight.shape))
        return small_linear(x, weight, *rest, **options)

    monkeypatch.setattr("tessera.kernels.small_linear.small_linear", counted)
    return shapes


def count_norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that are normed in launches of their own from now on."""
    rows: list[int] = []

    from tessera.kernels.norm import rms_norm

    def counted(hidden: Tensor, *rest: Any) -> Tensor:
        rows.append(hidden.shape[0])
        return rms_norm(hidden, *rest)

    monkeypatch.setattr("tessera.kernels.norm.rms_norm", counted)
    return rows


def flags(model: nn.Module) -> set[bool]:
    return {bool(module.fused) for module in model.modules() if hasattr(module, "fused")}


def fused_kinds(model: nn.Module) -> set[tuple[str, bool]]:
    """Of each kind of layer that can be fused, whether it is."""
    return {(type(module).__name__, bool(module.fused)) for module in model.modules() if hasattr(module, "fused")}


@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("qk_norm", "bias", "tokens"),
    [(False, False, "2"), (True, True, "3"), (False, False, "10"), (True, True, "10"), (False, True, "20")],
)
def test_a_fused_model_answers_and_stores_as_a_plain_one(
    dtype: torch.dtype, qk_norm: bool, bias: bool, tokens: str
) -> None:
    spec = make_spec(qk_norm=qk_norm, bias=bias)
    expected, expected_pages = answers_of(spec, dtype, fused=False, tokens=tokens)
    found, pages = answers_of(spec, dtype, fused=True, tokens=tokens)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(pages, expected_pages, atol=tolerance, rtol=tolerance)
    written = (pages != make_pages(spec, dtype)).any(-1).sum()
    assert written == 2 * 2 * int(tokens) * 2  # layers, k and v, tokens, heads


@needs_kernels
@pytest.mark.parametrize("tokens", PREFILLS)
def test_a_small_step_takes_four_products_a_layer_and_a_larger_one_none(
    tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = count_small(monkeypatch)
    answers_of(make_spec(), torch.float32, fused=True, tokens=tokens)
    small = [(160, 48), (48, 96), (80, 48), (48, 40)]
    assert shapes == ([] if tokens == "20" else small * 2)


@needs_kernels
def test_in_half_types_more_tokens_take_them_beside_the_smallest_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = count_small(monkeypatch)
    answers_of(make_spec(), torch.float16, fused=True, tokens="20")
    assert len(shapes) == 2 * 4
    monkeypatch.setattr(linear, "MOST_WEIGHT_BYTES", ((256, 80 * 48 * 2 - 1), (16, 2**24)))
    answers_of(make_spec(), torch.float16, fused=True, tokens="20")
    assert len(shapes) == 2 * 4


@needs_kernels
def test_beside_a_large_weight_only_the_smallest_steps_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 80 * 48 * 4  # of the four
    monkeypatch.setattr(linear, "MOST_WEIGHT_BYTES", ((256, largest - 1), (16, largest - 1)))
    shapes = count_small(monkeypatch)
    answers_of(make_spec(), torch.float32, fused=True, tokens="2")
    assert shapes == []
    monkeypatch.setattr(linear, "ANY_WEIGHT_TOKENS", 3)
    answers_of(make_spec(), torch.float32, fused=True, tokens="2")
    assert len(shapes) == 2 * 4


@needs_kernels
@pytest.mark.parametrize("bias", [False, True])
def test_a_step_of_more_tokens_takes_them_with_norms_of_their_own(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, expected_pages = answers_of(make_spec(bias=bias), torch.float32, fused=False, tokens="10")
    shapes, norms = count_small(monkeypatch), count_norms(monkeypatch)
    found, pages = answers_of(make_spec(bias=bias), torch.float32, fused=True, tokens="10")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pages, expected_pages, atol=1e-5, rtol=1e-5)
    assert len(shapes) == 2 * 4
    assert norms == [11] * (2 * 2 + 1)  # two a layer and the model's, of tokens and padding


@needs_kernels
def test_a_gate_that_is_not_silu_is_opened_by_torch() -> None:
    spec = make_spec(activation="gelu")
    expected = answers_of(spec, torch.float32, fused=False, tokens="2")[0]
    torch.testing.assert_close(answers_of(spec, torch.float32, fused=True, tokens="2")[0], expected)


@needs_kernels
@pytest.mark.skipif(DEVICE != "cpu", reason="weights are packed on a CPU")
def test_a_packed_weight_is_not_multiplied_in_small_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = count_small(monkeypatch)
    expected = answers_of(make_spec(), torch.float32, fused=False, tokens="2")[0]
    found = answers_of(make_spec(), torch.float32, fused=True, tokens="2", prepare=True)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not shapes


def make_pages(spec: ModelSpec, dtype: torch.dtype) -> Tensor:
    """What the pools hold before a step."""
    return torch.stack(make_step(spec, dtype, fused=False)[2])


@needs_kernels
def test_only_silu_gates_are_fused() -> None:
    placement = Placement(torch.float32, torch.device(DEVICE))
    kinds = {
        name: GatedMLP(8, 8, name, bias=False, placement=placement, fused=True).fused
        for name in ("silu", "swish", "gelu")
    }
    assert kinds == {"silu": True, "swish": True, "gelu": False}


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_a_fused_layer_needs_attention_that_is_fused() -> None:
    model = make_model(make_spec(), torch.float32, fused=True)
    step, positions, _ = make_step(make_spec(), torch.float32, fused=False)
    layer = model.get_submodule("layers.0.attention")
    rotation = (positions[:, None, None].float().expand(-1, 1, 16),) * 2
    with pytest.raises(RuntimeError, match="attention that is not fused"):
        layer(torch.zeros(11, 48, device=DEVICE), rotation, step)


def test_nothing_is_fused_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert not fused.fused_on(cpu)
    model = Llama(make_spec(), Placement(torch.float32, cpu))
    assert flags(model) == {False}
    shape = Shape(6, 2, 16, 0.25, torch.float32, "cpu", (0, 0), 16)
    assert not Attention({Phase.DECODE: [Naive(Phase.DECODE, shape)]}, [0]).fused


def test_a_norm_adds_before_it_norms() -> None:
    norm = RMSNorm(16, 1e-5, Placement(torch.bfloat16, torch.device("cpu")))
    norm.weight.normal_()
    hidden, update = torch.randn(2, 3, 16).bfloat16()
    total, normed = norm.add(hidden, update)
    assert torch.equal(total, hidden + update)
    assert torch.equal(normed, norm(total))


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_every_layer_is_fused_where_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in FUSABLE:
        monkeypatch.setattr(f"tessera.model.{module}.fused_on", lambda _: True)
    assert fused_kinds(make_model(make_spec(qk_norm=True), torch.float32)) == ASKED


@needs_cuda
def test_layers_on_cuda_are_fused_by_themselves() -> None:
    spec = make_spec(qk_norm=True)
    assert fused_kinds(make_model(spec, torch.bfloat16)) == ASKED
    shape = Shape(6, 2, 16, 0.25, torch.bfloat16, "cuda", torch.cuda.get_device_capability(), 16)
    assert Attention({Phase.DECODE: [Naive(Phase.DECODE, shape)]}, [0]).fused
