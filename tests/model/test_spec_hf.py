"""What a config.json says, by our reading and by transformers': the same spec, or a refusal by both."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.errors import ModelError
from tessera.model.hf_defaults import DEFAULTS
from tessera.model.known_shapes import CONFIGS
from tessera.model.spec import ModelSpec
from tessera.model.spec_hf import spec_from_folder
from transformers_spec import spec_through_transformers

FAMILIES = sorted(DEFAULTS)
FULL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "gelu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-4,
    "tie_word_embeddings": True,
    "eos_token_id": [3, 5],
    "rope_theta": 777.0,
}
QWEN = FULL | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
FILES: dict[str, dict[str, Any]] = {
    "llama": FULL | {"attention_bias": True, "mlp_bias": True},
    "mistral": FULL | {"sliding_window": 16},
    "qwen2": QWEN,
    "qwen3": QWEN | {"attention_bias": True},
    "gpt2": {
        "vocab_size": 96,
        "n_positions": 256,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 70,
        "activation_function": "relu",
        "layer_norm_epsilon": 1e-4,
        "scale_attn_weights": False,
        "tie_word_embeddings": False,
        "eos_token_id": 3,
    },
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.5},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": None,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
}
ODD: tuple[Any, ...] = (
    None,
    "x",
    True,
    False,
    0,
    1,
    -1,
    2.5,
    1000,
    float("inf"),
    10**400,
    [],
    [1],
    ["x"],
    {},
    {"a": 1},
)
BY_CHANCE = {"rope_theta": (True, False), "partial_rotary_factor": (True,), "truncate": ODD[1:2] + ODD[4:]}
"""Settings that transformers takes without a look at their type, and values with which it would not stop."""
WHOLE = {"rms_norm_eps": (0,), "layer_norm_epsilon": (0,)}
"""Whole numbers where transformers wants a point: a number to us."""


def variants(family: str) -> Iterator[dict[str, Any]]:
    """The least, the full, and both with each key left out, null, or of an odd value."""
    for base in ({}, FILES[family]):
        yield base
        for key in DEFAULTS[family]:
            yield {name: value for name, value in base.items() if name != key}
            allowed = BY_CHANCE.get(key, ()) + WHOLE.get(key, ())
            yield from (base | {key: value} for value in ODD if not is_in(value, allowed))
    yield {"model_type": family, "architectures": ["XForCausalLM"], "dtype": "float32", "attention_dropout": 0.1}


def is_in(value: Any, values: tuple[Any, ...]) -> bool:
    """True is no 1 here."""
    return any(type(value) is type(each) and value == each for each in values)


def ropes() -> Iterator[dict[str, Any]]:
    """Every kind in every form, with each setting left out, null, or of an odd value."""
    for kind, settings in ROPES.items():
        for form in ({"rope_type": kind}, {"type": kind}, {"rope_type": kind, "type": "linear"}):
            for name in ("rope_parameters", "rope_scaling"):
                yield {name: form | settings}
                yield {name: form | settings | {"rope_theta": 5e5}, "rope_theta": 1e3}
                yield {name: form | settings | {"rope_theta": None}, "rope_theta": 1e3}
                yield {name: form | settings, "rope_theta": None}
                yield {name: form | settings | {"partial_rotary_factor": 1.0}, "partial_rotary_factor": 0.5}
                yield {name: form | settings, "original_max_position_embeddings": 16}
        for key in settings:
            rest = {name: value for name, value in settings.items() if name != key}
            yield {"rope_parameters": {"rope_type": kind} | rest}
            allowed = (*BY_CHANCE.get(key, ()), True)
            for value in ODD:
                if not is_in(value, allowed):
                    yield {"rope_parameters": {"rope_type": kind} | settings | {key: value}}
    yield {"rope_parameters": {"rope_type": "linear", "factor": 2}, "rope_scaling": {"type": "linear", "factor": 3}}
    for other in ("dynamic", "longrope", "su", "mrope", "proportional", "axial", "x", "", 1, None):
        yield {"rope_scaling": {"rope_type": other, "factor": 2.0}}
        yield {"rope_scaling": {"type": other}}
    yield {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 4, 4]}}
    yield {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5.0}}}


def windows() -> Iterator[dict[str, Any]]:
    """Windows on and off, in all layers, in some, by number and by name."""
    full, sliding = "full_attention", "sliding_attention"
    named: list[list[Any]] = [[full] * 3, [sliding] * 3, [full, sliding, "attention"], [full, sliding, "conv"]]
    named += [[full, sliding], [[]] * 3]
    for on in (True, False):
        for window in (None, 0, -4, 4, 2**40):
            base = {"use_sliding_window": on, "sliding_window": window}
            yield base
            yield from (base | {"max_window_layers": number} for number in (-1, 0, 9))
            yield from (base | {"layer_types": kinds} for kinds in named)


def outcomes(family: str, config: dict[str, Any], folder: Path) -> tuple[ModelSpec | str, ModelSpec | str]:
    """(ours, transformers'): a spec, or why there is none."""
    (folder / "config.json").write_text(json.dumps({"model_type": family} | config))
    found: list[ModelSpec | str] = []
    for read in (spec_from_folder, lambda path: spec_through_transformers(path, torch.float32)):
        try:
            found.append(read(folder))
        except ModelError as error:
            found.append(f"refused: {error}")
    return found[0], found[1]


def check_alike(family: str, configs: Iterator[dict[str, Any]], folder: Path) -> None:
    """Each config has one meaning, or is refused with what is wrong and what to do."""
    specs, refusals = 0, 0
    for config in configs:
        ours, theirs = outcomes(family, config, folder)
        if isinstance(ours, str) and isinstance(theirs, str):
            refusals += 1
            assert len(ours) < 600 and "not a valid configuration" not in ours, config
        else:
            specs += 1
            assert ours == theirs, config
    assert specs > 5 and refusals > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_means_what_transformers_says(family: str, tmp_path: Path) -> None:
    check_alike(family, variants(family), tmp_path)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_rotary_settings_of_every_form_mean_what_transformers_says(family: str, tmp_path: Path) -> None:
    check_alike(family, (FILES[family] | rope for rope in ropes()), tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_are_in_the_layers_that_transformers_says(family: str, tmp_path: Path) -> None:
    check_alike(family, (FILES[family] | window for window in windows()), tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_known_shapes_mean_what_transformers_says(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name] | {"torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2}
    ours, theirs = outcomes(config["model_type"], config, tmp_path)
    assert isinstance(ours, ModelSpec) and ours == theirs


@pytest.mark.parametrize("config", [{"hidden_size": 24, "n_embd": 48}, {"num_hidden_layers": 2}])
def test_gpt2_sizes_under_their_common_names_decide(config: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = outcomes("gpt2", config, tmp_path)
    assert isinstance(ours, ModelSpec) and ours == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_and_types_are_those_of_transformers_classes(family: str) -> None:
    from transformers import CONFIG_MAPPING

    theirs = {field.name: field for field in fields(CONFIG_MAPPING[family])}
    elsewhere = {"rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"}
    elsewhere |= {"head_dim"} if family == "qwen2" else set()  # read by the model, not by the class
    assert set(DEFAULTS[family]) - set(theirs) == elsewhere & set(DEFAULTS[family])
    for key in set(DEFAULTS[family]) - elsewhere:
        row, field = DEFAULTS[family][key], theirs[key]
        is_union = isinstance(field.type, types.UnionType)
        kinds = set(typing.get_args(field.type)) if is_union else {field.type}
        assert (row.default, row.null) == (field.default, type(None) in kinds), key
        assert row.kind is object or row.kind in {typing.get_origin(kind) or kind for kind in kinds}, key


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "flag": ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes', not true or false"),
    "word": ("llama", {"hidden_act": ["silu"]}, r"hidden_act \['silu'\], not a word"),
    "null": ("mistral", {"num_key_value_heads": None}, "num_key_value_heads None, not a whole number"),
    "number": ("qwen2", {"rms_norm_eps": "1e-6"}, "rms_norm_eps '1e-6', not a number"),
    "theta": ("llama", {"rope_theta": "10000"}, "rope_theta '10000', not a number"),
    "theta within": (
        "llama",
        {"rope_parameters": {"rope_theta": "10000"}},
        "rope_theta '10000' in its rope settings, not a",
    ),
    "factor": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": "2"}},
        "factor '2' in its rope settings, not a number",
    ),
    "no factor": ("llama", {"rope_scaling": {"type": "yarn"}}, "yarn rope settings without factor"),
    "truncate": (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": "no"}},
        "truncate 'no' in its rope",
    ),
    "rope list": ("llama", {"rope_scaling": ["linear"]}, r"rope_scaling \['linear'\], not an object"),
    "rope kind": ("llama", {"rope_scaling": {"type": ["x"]}}, r"rope_type \['x'\], supported are default, linear"),
    "heads": ("llama", {"hidden_size": 50}, "hidden_size 50, not a multiple of num_attention_heads 32"),
    "gpt2 heads": ("gpt2", {"n_head": 7}, "n_embd 768, not a multiple of n_head 7"),
    "gpt2 null": ("gpt2", {"hidden_size": None}, "n_embd None, not a whole number"),
    "layer types": ("qwen3", {"layer_types": ["full_attention"]}, "of 1 layers, but num_hidden_layers 32"),
    "dtype": ("llama", {"dtype": ["float32"]}, r"dtype \['float32'\], supported are"),
    "end token": ("qwen2", {"eos_token_id": [True]}, r"eos_token_id \[True\] is not a token id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_value_is_refused_with_its_key_and_what_to_do(case: str, tmp_path: Path) -> None:
    family, config, sentence = REFUSED[case]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | config))
    with pytest.raises(ModelError, match=sentence) as refused:
        spec_from_folder(tmp_path)
    assert refused.value.hint


def test_an_epsilon_may_be_a_whole_number(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "rms_norm_eps": 0}')
    assert spec_from_folder(tmp_path).norm_eps == 0.0
