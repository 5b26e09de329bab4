from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tessera import LLM, SamplingParams
from tessera.config import ModelConfig
from tessera.errors import ModelError
from tessera.model.known_shapes import CONFIGS
from tessera.model.registry import load_spec, num_weight_bytes
from tessera.model.source import find_model
from tessera.text.tokenizer import load_tokenizer

PARAMETERS = {
    "135m": 134.5e6,
    "360m": 361.8e6,
    "1.7b": 1.711e9,
    "7b": 7.242e9,
    "llama-3-8b": 8.03e9,
    "qwen3-0.6b": 596e6,
    "gpt2": 124.4e6,
}
"""As their makers count them."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shape_has_the_parameters_and_the_vocabulary_of_its_model(name: str) -> None:
    config = ModelConfig(model=f"dummy:{name.upper()}")
    source = find_model(config)
    spec, tokenizer = load_spec(source), load_tokenizer(source, config)
    assert source.name == f"dummy-{name}"
    assert num_weight_bytes(spec, torch.float32, torch.device("cuda")) / 4 == pytest.approx(PARAMETERS[name], rel=0.01)
    assert tokenizer.vocab_size == spec.vocab_size
    assert tokenizer.decode(tokenizer.encode("half a word, café")) == "half a word, café"
    assert tokenizer.decode([spec.vocab_size - 1]) == f"<{spec.vocab_size - 1}>"


def test_a_shape_runs_with_random_weights_and_no_other_flag() -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    llm = LLM("dummy:gpt2", num_pages=8, attention="naive", dtype="float32")
    assert llm.info.model == "dummy-gpt2" and llm.info.vocab_size == 50257
    assert len(llm.generate([[1, 2, 3]], params, use_tqdm=False)[0].outputs[0].token_ids) == 3


def test_an_unknown_shape_is_refused_with_the_nearest() -> None:
    with pytest.raises(ModelError, match="there is no model dummy:350m") as refused:
        find_model(ModelConfig(model="dummy:350m"))
    assert refused.value.hint == "did you mean dummy:360m?"


def test_a_revision_of_a_shape_is_refused() -> None:
    with pytest.raises(ModelError, match="means nothing for dummy:gpt2"):
        find_model(ModelConfig(model="dummy:gpt2", revision="main"))
