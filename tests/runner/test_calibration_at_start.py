"""The unified maximum is where the model's own scores lie, measured at start, for those that ask alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tessera.attention import registry
from tessera.attention.backends.naive import Naive
from tessera.attention.calibrate import Calibration
from tessera.attention.contract import Phase, Shape
from tessera.attention.step import Attention
from tessera.config import EngineConfig
from tessera.engine.build import build_engine
from tessera.model import known_shapes
from tessera.model.layers.parameter import Placement
from tessera.model.llama import Llama
from tessera.model.spec import ModelSpec, Rope
from tessera.runner.calibrate import NUM_SEQUENCES, NUM_TOKENS, calibrate
from tessera.runner.prove import StepLimits

SPEC = ModelSpec(
    architecture="llama", vocab_size=64, hidden_size=48, intermediate_size=80, num_layers=3, num_q_heads=6,
    num_kv_heads=2, head_dim=16, max_position=256, norm_eps=1e-6, dtype=torch.float32, scale=0.25,
    windows=(None, 8, None), eos_token_ids=(3,), tie_word_embeddings=True, activation="silu", rope=Rope(theta=100.0),
)  # fmt: skip
LIMITS = StepLimits(max_num_seqs=8, max_num_tokens=512, max_model_len=256, num_pages=40, page_size=16)


class Asking(Naive):
    """Wants to know; what it is told must not depend on what it was bound with."""

    name: ClassVar[str] = "asking"

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        self.unified_max = -99.0


def make_model(gain: float) -> Llama:
    model = Llama(SPEC, Placement(torch.float32, torch.device("cpu")))
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data.copy_(values * gain if parameter.dim() > 1 else torch.ones(parameter.shape))
    return model


def attention_of(decode: type[Naive]) -> Attention:
    shapes = [Shape(6, 2, 16, 0.25, torch.float32, "cpu", (0, 0), 16, window) for window in (None, 8)]
    backends: dict[Phase, list[Any]] = {Phase.PREFILL: [Naive(Phase.PREFILL, shape) for shape in shapes]}
    backends[Phase.DECODE] = [decode(Phase.DECODE, shape) for shape in shapes]
    return Attention(backends, [0, 1, 0], fused=False)


def pools() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    made = [[torch.zeros(LIMITS.num_pages, 16, 2, 16) for _ in range(3)] for _ in range(2)]
    return made[0], made[1]


@pytest.mark.parametrize("gain", [0.1, 0.5])
def test_the_unified_maximum_is_found_on_the_models_own_words(gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    observed: list[tuple[int, int, tuple[int, ...]]] = []
    observe = Calibration.observe

    def noted(self: Calibration, layer: int, q: torch.Tensor, k: torch.Tensor, lens: Any) -> None:
        observed.append((layer, len(q), tuple(lens)))
        assert q.shape[0] == k.shape[0] == sum(lens)
        observe(self, layer, q, k, lens)

    monkeypatch.setattr(Calibration, "observe", noted)
    attention = attention_of(Asking)
    found = calibrate(make_model(gain), attention, pools(), LIMITS, torch.device("cpu"))
    assert found is not None and found.model.safe_share > 0.99
    assert observed == [(layer, NUM_SEQUENCES * NUM_TOKENS, (NUM_TOKENS,) * NUM_SEQUENCES) for layer in range(3)]
    assert [backend.unified_max for backend in attention.bound(Phase.DECODE)[0]] == [found.phi] * 2  # type: ignore[attr-defined]
    assert found.layers[0].highest != found.layers[1].highest


def test_scores_are_those_of_the_layer_that_is_watched() -> None:
    """A model of larger weights has larger scores, and what is found follows them."""
    small, large = (
        calibrate(make_model(gain), attention_of(Asking), pools(), LIMITS, torch.device("cpu")) for gain in (0.1, 0.8)
    )
    assert small is not None and large is not None
    assert large.model.highest > 10 * small.model.highest


def test_nobody_is_measured_where_nobody_asks() -> None:
    model = make_model(0.1)
    assert calibrate(model, attention_of(Naive), pools(), LIMITS, torch.device("cpu")) is None


def test_little_room_is_enough() -> None:
    limits = StepLimits(max_num_seqs=1, max_num_tokens=16, max_model_len=16, num_pages=1, page_size=16)
    assert calibrate(make_model(0.1), attention_of(Asking), pools(), limits, torch.device("cpu")) is not None


def test_an_engine_measures_before_it_serves_and_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = known_shapes._llama(64, 128, 2, 2, 1, 100, max_position_embeddings=256, eos_token_id=3)
    (tmp_path / "config.json").write_text(json.dumps(shape | {"torch_dtype": "float32"}))
    monkeypatch.setitem(registry.BACKENDS, "asking", f"{__name__}:Asking")
    flags = {"model": str(tmp_path), "load_format": "dummy", "dtype": "float32", "num_pages": 40}
    info = build_engine(
        EngineConfig.from_flat(flags | {"prefill_attention": "naive", "decode_attention": "asking"})
    ).info
    prefill, decode = info.attention
    assert prefill.reason == "named"
    assert re.fullmatch(r"named; unified maximum -?\d+\.\d\d, which suits \d+\.\d\d% of rows", decode.reason)
