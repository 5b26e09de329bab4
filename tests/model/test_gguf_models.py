from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from dense_attention import all_logits
from hf_reference import default_model_reference, default_source
from tessera.errors import ModelError
from tessera.model.language_model import LanguageModel
from tessera.model.layers.rope import frequencies
from tessera.model.registry import load_model, load_spec
from tessera.model.source import ModelSource
from tessera.model.spec import Rope
from tiny_gguf import write_gguf
from tiny_models import make_model

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {}),
    "llama tied, biases": ("llama", "llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama head_dim 20": ("llama", "llama", {"head_dim": 20}),
    "mistral": ("mistral", "llama", {"sliding_window": None}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", "gpt2", {}),
}
TOKEN_IDS = torch.randint(0, 96, (60,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("case", CASES)
def test_gguf_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    family, architecture, settings = CASES[case]
    theirs = make_model(family, tmp_path / "tiny", **settings)
    write_gguf(theirs, tmp_path / "tiny.gguf", architecture=architecture)
    _assert_equal(_load(tmp_path / "tiny.gguf"), theirs)


def test_mistral_gguf_with_a_window_sees_no_further(tmp_path: Path) -> None:
    theirs = make_model("mistral", tmp_path / "tiny", sliding_window=9)
    window = {"llama.attention.sliding_window": 9}
    write_gguf(theirs, tmp_path / "tiny.gguf", architecture="llama", metadata=window)
    _assert_equal(_load(tmp_path / "tiny.gguf"), theirs)


def test_llama3_frequency_factors_are_honoured(tmp_path: Path) -> None:
    theirs = make_model("llama", tmp_path / "tiny", rope_parameters=LLAMA3, head_dim=64)
    plain = 1.0 / 500_000.0 ** (torch.arange(0, 64, 2) / 64)
    factors = (plain / theirs.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert factors.max() == pytest.approx(8) and factors.min() == pytest.approx(1)
    extra = {"rope_freqs.weight": factors}
    write_gguf(theirs, tmp_path / "tiny.gguf", architecture="llama", extra=extra)
    _assert_equal(_load(tmp_path / "tiny.gguf"), theirs)


def test_linear_rope_scaling_is_honoured(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
    theirs = make_model("llama", tmp_path / "tiny", rope_parameters=rope)
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 3.0}
    write_gguf(theirs, tmp_path / "tiny.gguf", architecture="llama", metadata=metadata)
    _assert_equal(_load(tmp_path / "tiny.gguf"), theirs)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_quantised_gguf_equals_its_own_dequantised_weights(kind: str, tmp_path: Path) -> None:
    number = gguf.GGMLQuantizationType[kind]
    theirs = make_model("qwen2", tmp_path / "tiny", hidden_size=64, intermediate_size=96)
    write_gguf(theirs, tmp_path / "tiny.gguf", architecture="qwen2", quantize=number)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                raw = gguf.quants.quantize(parameter.numpy(), number)
                parameter.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(raw, number))))
    _assert_equal(_load(tmp_path / "tiny.gguf"), theirs)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"llama.expert_count": 8}, "llama.expert_count 8"),
    "softcap": ({"llama.attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0"),
    "partial rotary": ({"llama.rope.dimension_count": 6}, "rope.dimension_count 6"),
    "yarn": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "'yarn' rope scaling"),
    "split": ({"split.count": 3}, "one of 3 parts"),
    "layers that differ": ({"llama.attention.head_count_kv": [2, 2, 1]}, "not one for all"),
    "no layers": ({"llama.block_count": 0}, "llama.block_count 0, which is not from 1 to 4096"),
    "half a number": ({"llama.block_count": "three"}, "'three', not a whole number"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One tiny model for the files that differ in metadata alone."""
    return make_model("llama", tmp_path_factory.mktemp("llama"))


SIZES = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [0, 2**32 - 1, 48.0, float("nan"), float("inf"), True, "48", [-3] * 3], ids=repr)
def test_gguf_size_that_no_model_has_is_refused_by_key_and_value(
    key: str, value: Any, llama: Any, tmp_path: Path
) -> None:
    write_gguf(llama, tmp_path / "tiny.gguf", architecture="llama", metadata={f"llama.{key}": value})
    shown = value[0] if isinstance(value, list) else value
    with pytest.raises(ModelError, match=rf"llama\.{re.escape(key)} {re.escape(repr(shown))}, (which is )?not "):
        load_spec(_source(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("metadata", [{"qwen2.attention.head_count": 60}, {"gpt2.attention.head_count": 60}])
def test_gguf_with_more_heads_than_width_is_refused(metadata: dict[str, Any], tmp_path: Path) -> None:
    (architecture,) = {key.split(".")[0] for key in metadata}
    write_gguf(make_model(architecture, tmp_path), tmp_path / "a.gguf", architecture=architecture, metadata=metadata)
    with pytest.raises(ModelError, match=r"qwen2\.attention\.key_length 0|48, not a multiple of 60 heads"):
        load_spec(_source(tmp_path / "a.gguf"))


@pytest.mark.parametrize("name", ["tiny-00001-of-00003.gguf", "tiny-00003-of-00003.gguf"])
def test_part_of_a_split_gguf_is_refused_by_its_name(name: str, llama: Any, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / name, architecture="llama")
    with pytest.raises(ModelError, match=r"one of 3 parts[\s\S]*gguf-split --merge"):
        load_spec(_source(tmp_path / name))


def test_later_part_without_an_architecture_is_refused_as_a_part(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="one of 2 parts"):
        load_spec(_source(tmp_path / "b.gguf"))


def test_gguf_of_a_single_part_is_loaded(llama: Any, tmp_path: Path) -> None:
    part = tmp_path / "tiny-00001-of-00001.gguf"
    write_gguf(llama, part, architecture="llama", metadata={"split.count": 1})
    assert load_spec(_source(part)).num_layers == 3


@pytest.mark.parametrize("case", REFUSED)
def test_gguf_metadata_that_is_not_computed_is_refused(case: str, tmp_path: Path) -> None:
    metadata, sentence = REFUSED[case]
    write_gguf(make_model("llama", tmp_path / "tiny"), tmp_path / "tiny.gguf", architecture="llama", metadata=metadata)
    with pytest.raises(ModelError, match=sentence):
        load_spec(_source(tmp_path / "tiny.gguf"))


def test_gguf_of_unknown_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"'mamba'.*not supported"):
        load_spec(_source(tmp_path / "tiny.gguf"))


def test_gguf_window_in_unknown_layers_is_refused(tmp_path: Path) -> None:
    theirs = make_model("qwen2", tmp_path / "tiny")
    window = {"qwen2.attention.sliding_window": 9}
    write_gguf(theirs, tmp_path / "tiny.gguf", architecture="qwen2", metadata=window)
    with pytest.raises(ModelError, match=r"sliding_window 9.*in which layers"):
        load_spec(_source(tmp_path / "tiny.gguf"))


def test_gguf_without_a_tensor_is_refused(tmp_path: Path) -> None:
    theirs = make_model("llama", tmp_path / "tiny")
    missing = ("blk.1.ffn_up.weight", "blk.2.attn_norm.weight")
    write_gguf(theirs, tmp_path / "tiny.gguf", architecture="llama", leave_out=missing)
    with pytest.raises(ModelError, match=r"lacks 2 of .* tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        _load(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("name", ["blk.0.attn_sinks.weight", "blk.0.ffn_gate_exps.weight", "blk.9.attn_q.weight"])
def test_gguf_with_a_tensor_too_many_is_refused(name: str, tmp_path: Path) -> None:
    theirs = make_model("llama", tmp_path / "tiny")
    extra = {name: np.zeros((48, 48), np.float32)}
    write_gguf(theirs, tmp_path / "tiny.gguf", architecture="llama", extra=extra)
    with pytest.raises(ModelError, match="has no place"):
        _load(tmp_path / "tiny.gguf")


def test_gguf_tensor_of_wrong_shape_is_refused(tmp_path: Path) -> None:
    theirs = make_model("llama", tmp_path / "tiny")
    extra = {"blk.0.attn_v.weight": np.zeros((12, 48), np.float32)}
    write_gguf(theirs, tmp_path / "tiny.gguf", architecture="llama", extra=extra)
    with pytest.raises(ModelError, match=r"shape \[12, 48\], the model needs \[24, 48\]"):
        _load(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_gguf_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(make_model("llama", tmp_path / "tiny"), path, architecture="llama")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ModelError, match="damaged"):
        _load(path)


def test_frequency_factors_divide_the_frequencies() -> None:
    rope = Rope(theta=100.0, scaling="factors", factors=(1.0, 4.0))
    torch.testing.assert_close(frequencies(rope, 4), torch.tensor([1.0, 0.025]))


def test_default_model_equals_transformers_with_the_same_weights() -> None:
    source = default_source()
    spec = load_spec(source)
    assert (spec.num_layers, spec.num_q_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    ours = load_model(spec, source, dtype=torch.float32, device=CPU)
    theirs = default_model_reference()
    token_ids = torch.randint(0, spec.vocab_size, (48,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = theirs(token_ids[None]).logits[0]
    (logits,) = all_logits(ours, token_ids.tolist())
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)  # logits here reach 35
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def _source(path: Path) -> ModelSource:
    return ModelSource("gguf", path, "tiny")


def _load(path: Path) -> LanguageModel:
    return load_model(load_spec(_source(path)), _source(path), dtype=torch.float32, device=CPU)


def _assert_equal(ours: LanguageModel, theirs: Any) -> None:
    with torch.inference_mode():
        expected = theirs(TOKEN_IDS[None]).logits[0]
    (logits,) = all_logits(ours, TOKEN_IDS.tolist())
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
