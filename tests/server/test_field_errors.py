"""What is said against a field names it, what it may be, what it is, and what to do."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tessera.errors import RequestError
from tessera.server.schema import ChatBody, CompletionBody, parse_body

CHAT = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("kind", "body", "message", "hint", "param"),
    [
        (CompletionBody, {"prompt": "a", "max_tokens": 1e30}, "max_tokens must be a whole number or null, got 1e+30",
         "leave it out for the default", "max_tokens"),
        (CompletionBody, {"prompt": "a", "stream": "yes"}, "stream must be true or false or null, got 'yes'",
         "leave it out for the default", "stream"),
        (CompletionBody, {"prompt": "a", "n": "5" * 900}, f"n must be a whole number or null, got '{'5' * 79}",
         "leave it out for the default", "n"),
        (CompletionBody, {"max_tokens": 1}, "the field 'prompt' is missing", "every request needs it", "prompt"),
        (CompletionBody, {"prompt": "a", "promt": 1}, "unknown field 'promt'", "leave it out", "promt"),
        (CompletionBody, {"prompt": "a", "logit_bias": {"5": "x"}}, "logit_bias[...] must be a number, got {'5': 'x'}",
         "give a number", "logit_bias[...]"),
        (ChatBody, {"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role may not be 'wizard'",
         "use one of system, developer, user, assistant", "messages[0].role"),
        (ChatBody, CHAT | {"messages": 5}, "messages must be a list, got 5", "give a list", "messages"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_refused_with_its_value(
    kind: type[Any], body: dict[str, Any], message: str, hint: str, param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        parse_body(msgspec.json.encode(body), kind)
    assert (caught.value.message, caught.value.hint, caught.value.param) == (message, hint, param)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "the body is not valid JSON"),
        (b"[1]", "the body must be a JSON object, got [1]"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "the body is nested too deeply"),
    ],
)
def test_a_body_that_is_no_object_is_refused_with_a_hint(raw: bytes, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_body(raw, CompletionBody)
    assert caught.value.message.startswith(message) and caught.value.hint
