"""An engine proves what serves before it serves: a liar and a wrong one are stopped, an honest one has its proof."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch

from tessera.attention import registry
from tessera.config import EngineConfig
from tessera.engine.build import build_engine
from tessera.errors import BackendError, TesseraError
from tessera.types import EngineInfo

Load = Callable[..., EngineInfo]
NUM_LAYERS = 5


@pytest.fixture(autouse=True)
def plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package beside tessera, which stands in liars.py, with a liar, a wrong one and an honest one."""
    paths = {"flash_attn": "liars:Liar", "wrong": "liars:Wrong", "honest": "liars:Honest"}
    points = EntryPoints(EntryPoint(name, path, "tessera.attention") for name, path in paths.items())
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points.select(group=group))


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Builds an engine on a tiny model that has no weights but random ones."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    always = {"model": str(tmp_path), "load_format": "dummy", "dtype": "float32", "device": "cpu", "num_pages": 16}
    return lambda **settings: build_engine(EngineConfig.from_flat(always | settings)).info


def test_a_liar_named_by_a_user_does_not_get_to_serve(load: Load) -> None:
    with pytest.raises(BackendError, match="flash_attn is not what attends in decode"):
        load(decode_attention="flash_attn", prove_attention=True)


def test_a_wrong_backend_is_stopped_before_the_weights_are_read(load: Load) -> None:
    with pytest.raises(BackendError, match="wrong fails its self-test for prefill"):
        load(attention="wrong", load_format="auto")  # there are none to be read
    with pytest.raises(TesseraError, match="weights"):
        load(attention="honest", load_format="auto")


@pytest.mark.parametrize("name", ["honest", "naive", "torch_sdpa", "torch_sdpa:math"])
def test_the_engine_holds_a_proof_of_each_phase_in_the_model(load: Load, name: str) -> None:
    info = load(attention=name, prove_attention=True)
    assert [choice.phase for choice in info.attention] == ["prefill", "decode"]
    for choice in info.attention:
        (proof,) = choice.proofs
        assert (proof.backend, proof.variant, proof.phase) == (name, name.partition(":")[2] or None, choice.phase)
        assert sum(use.calls for use in proof.symbols) >= NUM_LAYERS
        assert proof.time_share is not None and 0 < proof.time_share < 1
        assert proof.versions["torch"] == torch.__version__ and proof.device == info.device


def test_proof_is_off_unless_it_is_asked_for(load: Load) -> None:
    assert all(choice.proofs == [] for choice in load(attention="torch_sdpa").attention)
