"""Weights of four bits that are multiplied as they are, and which steps and files that concerns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from dense_attention import all_logits
from hf_reference import default_source
from tessera.config import EngineConfig
from tessera.engine.build import build_engine
from tessera.errors import CapacityError, ConfigError
from tessera.model import gguf_four_bits
from tessera.model.gguf_four_bits import find_four_bits
from tessera.model.language_model import LanguageModel
from tessera.model.layers import four_bits
from tessera.model.layers.four_bits import BLOCK, MOST_TOKENS, FourBits, fits, processor_refused
from tessera.model.layers.linear import Linear, packs
from tessera.model.registry import load_model, load_spec, num_weight_bytes
from tessera.model.source import ModelSource
from tessera.runner import memory
from tiny_gguf import write_gguf
from tiny_models import make_model

CPU = torch.device("cpu")
HALF = torch.bfloat16
Q4_0, Q4_1, Q4_K, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q4_K", "Q8_0"))
needs_bfloat16 = pytest.mark.skipif(not packs(HALF, CPU), reason="this processor does not compute in bfloat16")
NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", "gpt2", {}),
}


def _parts(num_outputs: int, num_inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_outputs)
    numbers = torch.randint(0, 16, (num_outputs, num_inputs), generator=generator, dtype=torch.uint8)
    groups = num_outputs, num_inputs // four_bits.GROUP
    return numbers, torch.rand(groups, generator=generator) / 50, torch.randn(groups, generator=generator) / 50


def _filled(num_outputs: int, num_inputs: int, rows: int) -> FourBits:
    kept, parts = FourBits(num_outputs, num_inputs), _parts(num_outputs, num_inputs)
    for start in range(0, num_outputs, rows):
        kept.fill(start, *(each[start : start + rows] for each in parts))
    return kept


@needs_bfloat16
@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (80, 64), (576, 1536), (960, 576)])
@pytest.mark.parametrize("num_tokens", [1, 3, MOST_TOKENS])
def test_the_product_is_that_of_the_weight_it_stands_for(shape: tuple[int, int], num_tokens: int) -> None:
    numbers, scales, offsets = _parts(*shape)
    weight = (numbers.view(len(numbers), -1, 32) - 8.0) * scales[..., None] + offsets[..., None]
    hidden = torch.randn(shape[1], num_tokens, generator=torch.Generator().manual_seed(1)).t().to(HALF)
    bias = torch.arange(shape[0]).to(HALF) / shape[0]
    assert fits(*shape) and not fits(shape[0] + 8, shape[1]) and not fits(shape[0], shape[1] + 16)
    kept = _filled(*shape, rows=shape[0])
    product = kept.multiply(hidden, bias)
    expected = hidden.float() @ weight.flatten(1).t() + bias.float()
    assert product.dtype == HALF
    assert (product.float() - expected).norm() < 0.005 * expected.norm()  # bfloat16 weights: 0.004


@needs_bfloat16
def test_packing_some_rows_at_a_time_makes_no_difference() -> None:
    hidden = torch.randn(2, 96).to(HALF)
    at_once = _filled(720, 96, rows=720).multiply(hidden, None)
    for rows in (BLOCK, 2 * BLOCK, 5 * BLOCK):
        assert torch.equal(_filled(720, 96, rows).multiply(hidden, None), at_once)


@needs_bfloat16
def test_a_row_of_a_small_step_does_not_depend_on_the_others() -> None:
    kept, hidden = _filled(576, 1536, rows=576), torch.randn(MOST_TOKENS, 1536).to(HALF)
    together = kept.multiply(hidden, None)
    for tokens in range(1, MOST_TOKENS):
        alone = [kept.multiply(hidden[start : start + tokens], None) for start in range(MOST_TOKENS - tokens)]
        assert all(torch.equal(rows, together[start : start + tokens]) for start, rows in enumerate(alone)), tokens


def test_a_processor_for_which_torch_has_no_fast_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "here it is DEFAULT" in str(processor_refused())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(sys, "platform", "win32")
    assert "on win32" in str(processor_refused())
    monkeypatch.setattr(sys, "platform", "linux")
    assert processor_refused() is None


def _linears(model: LanguageModel) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is Linear}


def _load(path: Path) -> LanguageModel:
    source = ModelSource("gguf", path, "tiny")
    return load_model(load_spec(source), source, dtype=HALF, device=CPU, four_bits=True)


def _quantize(
    values: np.ndarray[Any, Any], kind: gguf.GGMLQuantizationType, quantize: Callable[..., Any]
) -> np.ndarray[Any, Any]:
    """As gguf does; in Q4_K, which it cannot write, any weights."""
    if kind != Q4_K:
        return np.asarray(quantize(values, kind))
    generator = np.random.default_rng(values.shape[0])
    groups = generator.integers(0, 256, (values.size // 256, 144), dtype=np.uint8)
    groups[:, :4] = generator.normal(0, 0.01, (len(groups), 2)).astype(np.float16).view(np.uint8)
    return groups.reshape(values.shape[0], -1)


@needs_bfloat16
@pytest.mark.parametrize("kind", [Q4_0, Q4_1, Q4_K])
@pytest.mark.parametrize("case", CASES)
def test_every_product_of_a_file_is_by_its_own_weights_in_small_steps_alone(
    case: str, kind: gguf.GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, architecture, settings = CASES[case]
    monkeypatch.setattr(gguf.quants, "quantize", partial(_quantize, quantize=gguf.quants.quantize))
    monkeypatch.setattr(gguf_four_bits, "_AT_A_TIME", 1)  # a block of rows, of several tensors and parts of heads
    sizes = {"n_embd": 256} if family == "gpt2" else {"hidden_size": 256, "intermediate_size": 512}
    write_gguf(
        make_model(family, tmp_path / "tiny", **sizes, **settings),
        tmp_path / "tiny.gguf",
        architecture=architecture,
        quantize=kind,
    )
    model = _load(tmp_path / "tiny.gguf")
    assert model.num_four_bit_layers == len(_linears(model)) > 0
    for name, linear in _linears(model).items():
        kept, linear.four_bits = linear.four_bits, None
        assert kept is not None and linear.packed is not None
        num_inputs = linear.packed.shape[1]
        few, more = (torch.randn(tokens, num_inputs).to(HALF) for tokens in (MOST_TOKENS, MOST_TOKENS + 1))
        expected, expected_of_more = linear(few), linear(more)
        linear.four_bits = kept
        found = linear(few)
        assert (found - expected).norm() < 0.01 * expected.norm(), name  # rows in their order, scales in their places
        assert torch.equal(found, kept.multiply(few, linear.bias)) and torch.equal(linear(more), expected_of_more)


@needs_bfloat16
def test_a_product_of_tensors_of_several_types_is_not_kept(tmp_path: Path) -> None:
    theirs = make_model("llama", tmp_path / "tiny", hidden_size=64, intermediate_size=96)
    float_v = {"blk.0.attn_v.weight": theirs.model.layers[0].self_attn.v_proj.weight.detach().numpy()}
    write_gguf(theirs, tmp_path / "whole.gguf", architecture="llama", quantize=Q4_0)
    write_gguf(theirs, tmp_path / "mixed.gguf", architecture="llama", quantize=Q8_0)
    whole, none = _load(tmp_path / "whole.gguf"), _load(tmp_path / "mixed.gguf")
    assert whole.num_four_bit_layers == len(_linears(whole)) and none.num_four_bit_layers == 0
    write_gguf(
        theirs, tmp_path / "v.gguf", architecture="llama", quantize=Q4_0, extra=float_v, unquantized=set(float_v)
    )
    model = _load(tmp_path / "v.gguf")
    lacking = [name for name, linear in _linears(model).items() if linear.four_bits is None]
    assert lacking == ["layers.0.attention.qkv"]


@needs_bfloat16
def test_a_file_in_which_no_layer_is_whole_in_4_bits_cannot_be_asked_for_them(tmp_path: Path) -> None:
    theirs = make_model("llama", tmp_path / "tiny", hidden_size=64, intermediate_size=96)
    kept = "blk.0.attn_k.weight"  # beside q and v that are not
    path, tensors = tmp_path / "k.gguf", {f"blk.{n}.{name}.weight" for n in range(9) for name in NAMES}
    write_gguf(theirs, path, architecture="llama", quantize=Q4_0, unquantized=tensors - {kept})
    settings = {"model": str(path), "tokenizer": str(default_source().path)}
    assert _kept(**settings) == 0
    with pytest.raises(ConfigError, match=r"--cpu-four-bits .* no layer of k is whole in them"):
        _kept(**settings, cpu_four_bits=True)


@needs_bfloat16
def test_the_default_model_has_them_in_all_layers_and_their_memory_is_known_before() -> None:
    source = default_source()
    model = load_model(load_spec(source), source, dtype=HALF, device=CPU, four_bits=True)
    found = find_four_bits(source, random=False, dtype=HALF, device=CPU)
    kept = [linear.four_bits for linear in _linears(model).values() if linear.four_bits is not None]
    assert len(kept) == model.num_four_bit_layers == 120
    assert found.num_bytes == sum(each.num_bytes for each in kept) and not found.refused
    token_ids = list(range(100, 100 + MOST_TOKENS))
    (small,) = all_logits(model, token_ids)
    for linear in _linears(model).values():
        linear.four_bits = None
    (large,) = all_logits(model, token_ids)
    difference = (small.softmax(-1) * (small.log_softmax(-1) - large.log_softmax(-1))).sum(-1)
    assert 0 < difference.mean() < 0.005


def test_where_they_cannot_be_kept_it_is_said_why(tmp_path: Path) -> None:
    source, path = default_source(), tmp_path / "tiny.gguf"
    write_gguf(make_model("llama", tmp_path / "tiny"), path, architecture="llama")
    cases: list[tuple[ModelSource, bool, torch.dtype, str, str]] = [
        (source, False, HALF, "cuda", "the device is cuda"),
        (source, False, torch.float32, "cpu", "the dtype is float32"),
    ]
    if packs(HALF, CPU):
        cases += [
            (source, True, HALF, "cpu", "the weights are random"),
            (ModelSource("folder", tmp_path, "here"), False, HALF, "cpu", "here is no GGUF file"),
            (ModelSource("gguf", path, "tiny"), False, HALF, "cpu", "no layer of tiny is of Q4_0 or Q4_1 or Q4_K"),
        ]
    for where, random, dtype, device, reason in cases:
        found = find_four_bits(where, random=random, dtype=dtype, device=torch.device(device))
        assert found.num_bytes == 0 and reason in found.refused


@needs_bfloat16
def test_an_engine_keeps_them_unless_told_not_to_and_refuses_where_it_cannot() -> None:
    assert [_kept(), _kept(cpu_four_bits=True), _kept(cpu_four_bits=False)] == [120, 120, 0]
    assert _kept(dtype="float32") == 0
    with pytest.raises(ConfigError, match=r"--cpu-four-bits .* the dtype is float32") as error:
        _kept(dtype="float32", cpu_four_bits=True)
    assert error.value.hint


@needs_bfloat16
def test_where_memory_is_left_for_the_weights_alone_an_engine_does_without_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = default_source()
    alone = num_weight_bytes(load_spec(source), HALF, CPU)
    both = alone + find_four_bits(source, random=False, dtype=HALF, device=CPU).num_bytes
    for usable, kept in ((both, 120), (both - 1, 0)):
        monkeypatch.setattr(memory, "free_memory_bytes", lambda _, usable=usable: -(-usable * 10 // 9))
        assert _kept() == kept and ("no memory is left for the file's own 4-bit" in caplog.text) == (kept == 0)
    with pytest.raises(CapacityError, match="with the file's own 4-bit ones the weights need") as error:
        _kept(cpu_four_bits=True)
    assert error.value.hint == "leave --cpu-four-bits out"
    monkeypatch.setattr(memory, "free_memory_bytes", lambda _: alone)
    with pytest.raises(CapacityError, match=r"^the weights need"):
        _kept()


def _kept(**settings: Any) -> int:
    common = {"dtype": "bfloat16", "attention": "torch_sdpa", "max_model_len": 64, "num_pages": 10}
    return build_engine(EngineConfig.from_flat(common | settings)).info.num_four_bit_layers
