"""Errors as OpenAI's clients read them: one JSON shape for every status."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tessera.errors import EngineDeadError, RequestError, TesseraError


class TooManyRequestsError(TesseraError):
    """The queue is full; the client should come back."""


class UnavailableError(EngineDeadError):
    """The engine is dead or hung, so a request is not even started."""


class UnknownModelError(RequestError):
    """A request names a model that is not served here."""


class TooLargeError(RequestError):
    """A request body above the limit."""


class UnknownCodingError(RequestError):
    """A request body that is packed."""


class ShutdownError(EngineDeadError):
    """The server was told to stop and a request did not finish in the time that was left."""


class ErrorBody(msgspec.Struct):
    """The inside of OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(msgspec.Struct):
    """OpenAI's error object, also the last event of a stream that fails."""

    error: ErrorBody


STATUSES: tuple[tuple[type[TesseraError], int, str, str | None], ...] = (
    (UnknownModelError, 404, "invalid_request_error", "model_not_found"),
    (TooLargeError, 413, "invalid_request_error", "request_too_large"),
    (UnknownCodingError, 415, "invalid_request_error", "unsupported_content_encoding"),
    (RequestError, 400, "invalid_request_error", None),
    (TooManyRequestsError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (UnavailableError, 503, "service_unavailable_error", "engine_unavailable"),
    (ShutdownError, 503, "service_unavailable_error", "shutting_down"),
    (EngineDeadError, 500, "server_error", "engine_dead"),
    (TesseraError, 500, "server_error", None),
)
"""Error class, HTTP status, type and code; the first that fits counts."""


HEADERS = {429: {"retry-after": "1"}, 503: {"retry-after": "1"}, 415: {"accept-encoding": "identity"}}
"""What goes with a status, beside the body."""


def status_of(error: TesseraError) -> int:
    """The HTTP status of an error."""
    return next(status for kind, status, _, _ in STATUSES if isinstance(error, kind))


def reply_of(error: TesseraError) -> ErrorReply:
    """An error in OpenAI's shape, its hint appended to the message."""
    kind, code = next((kind, code) for known, _, kind, code in STATUSES if isinstance(error, known))
    message = f"{error.message} (hint: {error.hint})" if error.hint else error.message
    return ErrorReply(ErrorBody(message, kind, getattr(error, "param", None), code))


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Any msgspec-encodable body as a response."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def error_response(error: TesseraError) -> Response:
    """The response to a request that failed with `error`."""
    status = status_of(error)
    return json_response(reply_of(error), status, HEADERS.get(status))


def plain_error(
    status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """A response for an error that is not a TesseraError: 401, 404, 405 and the unexpected."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return json_response(ErrorReply(ErrorBody(message, kind, None, code)), status, headers)


def client_gone() -> Response:
    """What is answered where nobody reads it any more: 499, as nginx counts it."""
    return Response(status_code=499)


async def on_tessera_error(_request: HttpRequest, error: Exception) -> Response:
    """Starlette's handler for TesseraError."""
    assert isinstance(error, TesseraError)
    return error_response(error)


async def on_unexpected(_request: HttpRequest, _error: Exception) -> Response:
    """Starlette's handler for what nobody foresaw; the traceback goes to the log, not to the client."""
    return plain_error(500, "an unexpected error happened in the server; its log has the details", "internal_error")
