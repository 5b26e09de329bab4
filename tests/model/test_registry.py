from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dense_attention import all_logits
from tessera.model.hf_keys import HOLDS, READ
from tessera.model.language_model import LanguageModel
from tessera.model.layers.linear import packs
from tessera.model.registry import FAMILIES, load_model, load_spec, num_weight_bytes
from tessera.model.source import ModelSource
from tiny_models import make_model

CPU = torch.device("cpu")


def test_every_family_that_is_read_can_be_built() -> None:
    assert set(FAMILIES) == set(READ) == set(HOLDS)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_dummy_weights_need_only_a_config_and_repeat_with_their_seed(
    family: str, folder: Path, source: ModelSource
) -> None:
    make_model(family, folder)
    (folder / "model.safetensors").unlink()
    first, again, other = (_dummy(source, seed) for seed in (1, 1, 2))
    token_ids = list(range(20))
    (logits,), (same,), (different,) = (all_logits(model, token_ids) for model in (first, again, other))
    assert torch.equal(logits, same)
    assert not torch.equal(logits, different)
    assert logits.isfinite().all() and logits.std() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes_are_known_before_loading(
    dtype: torch.dtype, tied: bool, folder: Path, source: ModelSource
) -> None:
    theirs = make_model("llama", folder, tie_word_embeddings=tied)
    spec = load_spec(source)
    size = torch.finfo(dtype).bits // 8
    expected = theirs.num_parameters() * size
    assert num_weight_bytes(spec, dtype, torch.device("cuda")) == expected
    kept = tied or dtype != torch.float32  # for the lookup; for the leading logits
    packed_head = 96 * 48 * size if kept and packs(dtype, CPU) else 0
    assert num_weight_bytes(spec, dtype) == expected + packed_head


def test_weights_never_ask_for_gradients_even_when_loaded_in_inference_mode(folder: Path, source: ModelSource) -> None:
    make_model("llama", folder)
    with torch.inference_mode():
        model = load_model(load_spec(source), source, dtype=torch.bfloat16, device=CPU)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_loading_leaves_torchs_threads_as_they_were(folder: Path, source: ModelSource) -> None:
    make_model("llama", folder)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        load_model(load_spec(source), source, dtype=torch.float32, device=CPU)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_progress_goes_to_stderr_and_only_when_asked(
    folder: Path, source: ModelSource, capfd: pytest.CaptureFixture[str]
) -> None:
    make_model("llama", folder)
    spec = load_spec(source)
    capfd.readouterr()
    load_model(spec, source, dtype=torch.float32, device=CPU)
    assert capfd.readouterr() == ("", "")
    load_model(spec, source, dtype=torch.float32, device=CPU, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "Loading weights" in err and "100%" in err


def _dummy(source: ModelSource, seed: int) -> LanguageModel:
    spec = load_spec(source)
    return load_model(spec, source, dtype=torch.float32, device=CPU, load_format="dummy", seed=seed)
