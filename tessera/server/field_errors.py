"""What msgspec says against a request body, as a sentence that names the field, what it may be and what it is."""

from __future__ import annotations

import re
from typing import Any

from tessera.errors import RequestError
from tessera.text.chat_template import ROLES

WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
"""msgspec's name of a type -> ours."""
MOST_CHARACTERS = 80
"""Of a value that is quoted."""


def field_error(message: str, body: Any) -> RequestError:
    """A message of msgspec about `body` as an error: "Expected `int`, got `str` - at `$.n`"."""
    what, _, place = message.partition(" - at ")
    found = re.search(r"`\$\.?([^`]*)`", place)
    path = found[1] if found else ""
    if match := re.fullmatch(r"Object (?:contains unknown|missing required) field `(.*)`", what, re.DOTALL):
        path = f"{path}.{match[1]}" if path else match[1]
        if "unknown" in what:
            return RequestError(f"unknown field {path[:200]!r}", "leave it out", param=path[:200])
        return RequestError(f"the field {path!r} is missing", "every request needs it", param=path)
    param, name = path[:200] or None, path[:200] or "the body"
    value = f"{_value_at(body, path)!r:.{MOST_CHARACTERS}}"
    if match := re.fullmatch(r"Expected `([^`]*)`(?:, got `[^`]*`)?", what):
        kinds = match[1].split(" | ")
        wanted = " or ".join(WORDS.get(kind, kind) for kind in kinds)
        hint = "leave it out for the default" if "null" in kinds else f"give {wanted}"
        return RequestError(f"{name} must be {wanted}, got {value}", hint, param=param)
    if what.startswith("Invalid enum value"):
        hint = f"use one of {', '.join(ROLES)}" if name.endswith("role") else "leave it out"
        return RequestError(f"{name} may not be {value}", hint, param=param)
    return RequestError(f"{name}: {what[:1].lower()}{what[1:]}"[:400], param=param)


def _value_at(body: Any, path: str) -> Any:
    """What stands at `messages[0].role`; of a key that msgspec does not name, the whole it is in."""
    value = body
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", re.sub(r"\[\.\.\.\].*", "", path)):
        try:
            value = value[name] if name else value[int(index)]
        except (KeyError, IndexError, TypeError):
            break
    return value
