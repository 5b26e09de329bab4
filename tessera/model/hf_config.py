"""A config.json with all its keys: read as it is, defaults filled in, types looked at."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessera.errors import ModelError
from tessera.model.hf_defaults import ALIASES, DEFAULTS, Key

HINT = "download or convert the model again"
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    list: "a list",
    dict: "an object of keys and values",
}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ModelError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _no_file(path) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}", "check --model") from None
    except (ValueError, RecursionError) as error:  # bytes, syntax, and whole numbers of thousands of digits
        raise ModelError(f"{path} is not valid JSON: {error}"[:300], "download the file again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not a JSON object", "download the file again")
    return value


def fill_in(raw: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Every key of `DEFAULTS` with the file's value or its default; ModelError for the first of a wrong type."""
    raw = dict(raw)
    for other, key in ALIASES.get(model_type, {}).items():
        if other in raw:
            raw[key] = raw[other]
    rows = DEFAULTS[model_type]
    return {key: check_type(key, raw[key], row) if key in raw else row.default for key, row in rows.items()}


def check_type(key: str, value: Any, row: Key) -> Any:
    """`value` where it has the type that transformers asks for; else ModelError, naming the key and the value."""
    if (value is None and row.null) or is_a(row.kind, value):
        return value
    raise ModelError(f"config.json has {key} {value!r:.80}, not {_NAMES[row.kind]}", HINT)


def is_a(kind: type, value: Any) -> bool:
    """Whether a JSON value is of a kind: true and false are no numbers, and a whole number is a float as well."""
    if isinstance(value, bool):
        return kind in (bool, object)
    if kind is float and isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def _no_file(path: Path) -> ModelError:
    if not path.parent.is_dir():
        return ModelError(f"{path.parent}: no such folder", "check --model")
    gguf_files = sorted(file.name for file in path.parent.glob("*.gguf"))
    hint = f"give the file itself: --model {path.parent / gguf_files[0]}" if gguf_files else "check --model"
    return ModelError(f"{path.parent} has no {path.name}", hint)
