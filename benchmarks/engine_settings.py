"""Settings of the engine as benchmarks take them: NAME=VALUE, values as JSON has them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any


def settings_of(parser: argparse.ArgumentParser, given: Iterable[str]) -> dict[str, Any]:
    """`dtype=bfloat16` and the like as a dictionary; ends the program where one has no `=`."""
    if wrong := [each for each in given if "=" not in each]:
        parser.error(f"--set takes NAME=VALUE, got {wrong[0]!r}")
    return {name: value_of(text) for name, text in (each.split("=", 1) for each in given)}


def value_of(text: str) -> Any:
    """`true`, `16` and the like as JSON has them; anything else is a text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
