"""One client's connection: uvicorn's, with a bound to what comes ahead of a body and to the time a request takes.

Bodies are bounded where they are read (`service.py`). Without these two a client without a key could fill the memory
with a header that never ends, or keep connections open with requests that never do.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tessera.server.errors import ErrorBody, ErrorReply

MAX_HEAD_BYTES = 2**16
"""Of the request line and all headers; as many of anything else that is not of a body, such as what follows one."""
REQUEST_SECONDS = 60.0
"""Within which a request has to come, from its first byte to the last of its body."""


class Connection(HttpToolsProtocol):
    """Answers 431 to a head larger than MAX_HEAD_BYTES, 408 to a request that takes longer than REQUEST_SECONDS, 400 to
    what is no HTTP, each as every other error is answered, and closes the connection.
    """

    _outside_body = 0
    """Bytes since the last one of a body."""
    _too_late: asyncio.TimerHandle | None = None
    _refused = False

    def data_received(self, data: bytes) -> None:
        """Bytes of the client (asyncio's callback)."""
        if self._refused:
            return
        self._outside_body += len(data)
        super().data_received(data)
        if self._too_late is not None and self._outside_body > MAX_HEAD_BYTES:
            self._refuse_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end (asyncio's callback)."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A request's first byte (the parser's callback)."""
        self._too_late = self.loop.call_later(REQUEST_SECONDS, self._refuse_slow)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A request's head (the parser's callback)."""
        self._outside_body = 0
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refuse_head()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Some of a body (the parser's callback)."""
        self._outside_body = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request's end (the parser's callback)."""
        self._stop_waiting()
        self._outside_body = 0
        if not self._refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP (uvicorn's callback)."""
        del msg  # the same for all
        self._refuse(400, "this is not an HTTP/1.1 request", "invalid_http")

    def _refuse_head(self) -> None:
        message = f"a request's line and headers may have {MAX_HEAD_BYTES} bytes together (hint: send fewer headers)"
        self._refuse(431, message, "headers_too_large")

    def _refuse_slow(self) -> None:
        message = f"the request has not come whole within {REQUEST_SECONDS:g} s (hint: send it again)"
        self._refuse(408, message, "request_timeout")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer and close; whatever else comes is thrown away."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._stop_waiting()
        body = msgspec.json.encode(ErrorReply(ErrorBody(message, "invalid_request_error", None, code)))
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def _stop_waiting(self) -> None:
        if self._too_late is not None:
            self._too_late.cancel()
            self._too_late = None
