"""Numbers in a config.json that no model has: one sentence each, before anything is built from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.errors import ModelError
from tessera.model.registry import load_spec, num_weight_bytes
from tessera.model.source import ModelSource

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
DECODER_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
GPT2_SIZES = ("vocab_size", "n_embd", "n_inner", "n_layer", "n_head", "n_positions", "num_hidden_layers")
SIZES = [("qwen2", key) for key in DECODER_SIZES] + [("gpt2", key) for key in GPT2_SIZES]
NO_SIZES = [0, -1, 2**32, 10**18, 48.0, float("nan"), float("inf"), True, "48", [48]]


@pytest.mark.parametrize(("family", "key"), SIZES)
@pytest.mark.parametrize("value", NO_SIZES, ids=repr)
def test_config_size_that_no_model_has_is_refused_by_key_and_value(
    family: str, key: str, value: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, key: value}))
    with pytest.raises(ModelError, match=rf"has {key} {re.escape(repr(value))}, (which is )?not "):
        load_spec(ModelSource("folder", tmp_path, "x"))


EXTREMES: dict[str, tuple[dict[str, Any], str]] = {
    "a million layers": ({"num_hidden_layers": 1_000_000}, "num_hidden_layers 1000000, which is not from 1 to 4096"),
    "heads wider than any": (
        {"num_attention_heads": 2**14, "num_key_value_heads": 1, "head_dim": 2**14, "hidden_size": 2**14},
        "num_q_heads times head_dim 268435456",
    ),
    "window": ({"model_type": "mistral", "sliding_window": 2**40}, "sliding_window 1099511627776"),
    "epsilon": ({"rms_norm_eps": float("nan")}, "epsilon is nan"),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "theta is nan"),
    "yarn of theta one": ({"rope_parameters": YARN | {"rope_theta": 1.0}}, "theta 1.0, which must be above 1"),
    "yarn from nothing": (
        {"rope_parameters": YARN | {"original_max_position_embeddings": 0}},
        "division by zero|original_max_position_embeddings",
    ),
    "yarn from infinity": (
        {"rope_parameters": YARN | {"original_max_position_embeddings": float("inf")}},
        "yarn rope settings that do not fit|original_max_position_embeddings",
    ),
    "yarn beyond counting": ({"rope_parameters": YARN | {"factor": 1e17}}, "max_position 6400000000000000000"),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_config_of_extreme_numbers_is_refused(case: str, tmp_path: Path) -> None:
    changes, sentence = EXTREMES[case]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | changes))
    with pytest.raises(ModelError, match=sentence):
        load_spec(ModelSource("folder", tmp_path, "x"))


def test_config_with_fewer_dimensions_than_heads_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "qwen2", "hidden_size": 16, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="head_dim 0"):
        load_spec(ModelSource("folder", tmp_path, "x"))


def test_config_number_of_thousands_of_digits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_spec(ModelSource("folder", tmp_path, "x"))


def test_weights_of_the_largest_sizes_are_counted(tmp_path: Path) -> None:
    size = 2**24
    heads = {"num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**12, "num_hidden_layers": 2}
    config = {"model_type": "llama", "vocab_size": size, "hidden_size": size, "intermediate_size": size} | heads
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_spec(ModelSource("folder", tmp_path, "x"))
    assert num_weight_bytes(spec, torch.float32) > 2**51
