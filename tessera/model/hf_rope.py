"""The rotary settings of a config.json, in the forms that transformers has had for them, as a `Rope`.

Older files have rope_theta beside rope_scaling with a `type`, newer ones rope_parameters with everything in it. Which
value decides is as in `RotaryEmbeddingConfigMixin` of transformers 5.23.0, modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tessera.errors import ModelError
from tessera.model.hf_config import HINT, is_a
from tessera.model.spec import Rope

_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""rope_type -> keys that it cannot do without; yarn's factor may be null, which is the ratio of the two lengths."""
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
}


def read_rope(config: Mapping[str, Any]) -> Rope:
    """The rotary settings of a config with all its keys; ModelError for what is not computed or does not fit."""
    settings = _settings(config)
    kind, theta = settings.pop("rope_type"), settings.pop("rope_theta")
    kind = "default" if kind is None else kind
    _check_keys(kind, settings)
    try:
        theta = 10_000.0 if theta is None else _number({"rope_theta": theta}, "rope_theta")
        return _make_rope(kind, theta, settings, config["max_position_embeddings"])
    except (ValueError, ArithmeticError) as error:
        raise ModelError(f"config.json has {kind} rope settings that do not fit: {error!r}"[:300], HINT) from None


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """One dict for every form: rope_scaling before rope_parameters, what is in them before what is beside them."""
    given = config["rope_scaling"] or config["rope_parameters"] or {}
    if not isinstance(given, dict):
        raise ModelError(f"config.json has rope_scaling {given!r:.80}, not an object of keys and values", HINT)
    settings = dict(given)
    settings.setdefault("rope_theta", config["rope_theta"])
    if config["partial_rotary_factor"] is not None:
        settings.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    settings.setdefault("rope_type", settings.pop("type", "default"))
    if settings["rope_type"] in ("llama3", "yarn"):
        settings.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return settings


def _check_keys(kind: Any, settings: Mapping[str, Any]) -> None:
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise ModelError(
            f"config.json has rope_type {kind!r:.80}, supported are {', '.join(_NEEDED)}",
            "use another model; the answers would be wrong without it",
        )
    known = {*_NEEDED[kind], *_OPTIONAL.get(kind, ())}
    for key, value in settings.items():
        unchanged = value is None or (key == "partial_rotary_factor" and value == 1)
        if key not in known and not unchanged:
            raise ModelError(
                f"config.json has {key} {value!r:.80} in its rope settings, not supported with {kind}",
                "use another model; the answers would be wrong without it",
            )
    for key in _NEEDED[kind]:
        may_be_null = (kind, key) == ("yarn", "factor")
        if key not in settings or (settings[key] is None and not may_be_null):
            raise ModelError(f"config.json has {kind} rope settings without {key}", HINT)


def _number(settings: Mapping[str, Any], key: str) -> float:
    value = settings[key]
    if not is_a(float, value):
        raise ModelError(f"config.json has {key} {value!r:.80} in its rope settings, not a number", HINT)
    return float(value)


def _make_rope(kind: Any, theta: float, settings: Mapping[str, Any], max_position: int) -> Rope:
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, scaling=kind, factor=_number(settings, "factor"))
    original = int(_number(settings, "original_max_position_embeddings"))
    if kind == "llama3":
        return Rope(
            theta=theta,
            scaling=kind,
            factor=_number(settings, "factor"),
            original_max_position=original,
            low_freq_factor=_number(settings, "low_freq_factor"),
            high_freq_factor=_number(settings, "high_freq_factor"),
        )
    factor = _number(settings, "factor") if settings["factor"] else max_position / original
    truncate = settings.get("truncate")
    if truncate is not None and not isinstance(truncate, bool):
        raise ModelError(f"config.json has truncate {truncate!r:.80} in its rope settings, not true or false", HINT)
    return Rope(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=_number(settings, "beta_fast") if settings.get("beta_fast") else 32.0,
        beta_slow=_number(settings, "beta_slow") if settings.get("beta_slow") else 1.0,
        truncate=truncate is not False,
        attention_factor=_yarn_attention_factor(factor, settings),
    )


def _yarn_attention_factor(factor: float, settings: Mapping[str, Any]) -> float:
    """The paper's temperature, 0.1 ln(s) + 1 (YaRN, arXiv 2309.00071, equation 22), unless the file has its own."""
    if settings.get("attention_factor") is not None:
        return _number(settings, "attention_factor")

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return temperature(_number(settings, "mscale")) / temperature(_number(settings, "mscale_all_dim"))
    return temperature(1.0)
