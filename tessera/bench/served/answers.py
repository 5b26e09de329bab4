"""What a server's HTTP answers to a plain GET, and in plain words why there is none."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import msgspec

ANSWER_SECONDS = 10.0
NO_ANSWER = (OSError, HTTPException, ValueError)
"""What `get` and the reading of its body raise; ValueError: msgspec's, and that of a URL that is none."""
_OF_SYSTEM = (
    (TimeoutError, f"no answer within {ANSWER_SECONDS:g} s"),
    (ConnectionRefusedError, "nothing listens there, the connection was refused"),
    (socket.gaierror, "no such host is known"),
    (ssl.SSLError, "it does not speak HTTPS as it should"),
    (ConnectionError, "the connection broke"),
)


def get(url: str, headers: Mapping[str, str]) -> bytes:
    """The body at `url`, asked directly: a proxy of the environment plays no part. One of NO_ANSWER where none came."""
    opener = build_opener(ProxyHandler({}))
    with opener.open(Request(url, headers=dict(headers)), timeout=ANSWER_SECONDS) as response:
        body: bytes = response.read()
    return body


def plain_cause(error: BaseException) -> str:
    """Why there was no answer, without the name of an exception: `nothing listens there, ...`, `it answered 404`."""
    if isinstance(error, HTTPError):
        return f"it answered {error.code} {error.reason}".strip()
    if isinstance(error, URLError) and isinstance(error.reason, BaseException):
        return plain_cause(error.reason)
    if isinstance(inner := getattr(error, "os_error", None), OSError):  # aiohttp's
        return plain_cause(inner)
    if isinstance(error, msgspec.MsgspecError):
        return f"its answer is not what OpenAI's API has there ({error!s:.100})"
    for kind, words in _OF_SYSTEM:
        if isinstance(error, kind):
            return words
    if isinstance(error, HTTPException):
        return "what answers there does not speak HTTP"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said or type(error).__name__
