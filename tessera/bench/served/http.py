"""HTTP/1.1 as a measuring client needs it: what arrived is noted with its time, and nothing else is done with it.

One read of a stream costs a few microseconds: httptools takes the chunks' frames off, to know where the answer ends;
events and JSON are for later. A client made for general use spends several times as long on a read, and what it does
then holds up the next one. Times are `time.perf_counter()`.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Mapping
from urllib.parse import urlsplit

import httptools

from tessera.bench.served.answers import plain_cause

KEEP_ALIVE_SECONDS = 2.0
"""An idle connection is used again for so long; servers close theirs after 5 s (uvicorn) or more."""
BUFFER_BYTES = 1 << 16
"""Of one read at most."""


class Answer:
    """One answer as it arrives: `reads` has the time and the body's bytes of each read."""

    def __init__(self) -> None:
        self.sent_at = 0.0
        """When its request was written."""
        self.ended_at = 0.0
        """When it was complete, or broke off."""
        self.status = 0
        self.headers: dict[str, str] = {}
        self.reads: list[tuple[float, bytes]] = []
        self.error = ""
        """Why it is not complete, in words."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.may_follow = False
        """Whether the connection can be used for another."""
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0

    @property
    def body(self) -> bytes:
        """What has come of it."""
        return b"".join(data for _, data in self.reads)

    def feed(self, data: bytes, now: float) -> None:
        """What one read brought."""
        self._now = now
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.end(f"the answer is not HTTP as it should be: {error}")

    def end(self, error: str = "") -> None:
        """Nothing more comes."""
        if self.ended_at:
            return
        self.error, self.ended_at = error, time.perf_counter()
        self.may_follow = self.may_follow and not error
        if not self.ended.done():  # who waited for it may have given up
            self.ended.set_result(None)

    def lose(self, error: Exception | None) -> None:
        """The connection is gone: which is how an answer of no told length ends."""
        told = {"content-length", "transfer-encoding"} & self.headers.keys()
        if self.status and not told and error is None:
            self.end()
        else:
            self.end(f"the connection broke: {plain_cause(error) if error else 'it was closed before the end'}")

    def on_header(self, name: bytes, value: bytes) -> None:
        """As httptools calls it, for what follows the last chunk too, which is none of the headers."""
        if not self.status:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1").strip()

    def on_headers_complete(self) -> None:
        """As httptools calls it; an answer that only says to go on is passed over."""
        if (status := self._parser.get_status_code()) >= 200:
            self.status = status
        else:
            self.headers.clear()

    def on_body(self, data: bytes) -> None:
        """As httptools calls it, once a chunk: those of one read are one."""
        if self.reads and self.reads[-1][0] == self._now:
            data = self.reads.pop()[1] + data
        self.reads.append((self._now, data))

    def on_message_complete(self) -> None:
        """As httptools calls it."""
        if self.status:
            self.may_follow = self._parser.should_keep_alive()
            self.end()


class Connection(asyncio.BufferedProtocol):
    """One connection: an answer at a time.

    Reads go into a buffer that is there: asyncio's own reads make one of 256 KiB each, which takes as long as the rest.
    """

    def __init__(self) -> None:
        self.is_lost = False
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's
        """As asyncio calls it."""
        return self._buffer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio calls it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def buffer_updated(self, nbytes: int) -> None:
        """As asyncio calls it; what nobody asked for closes the connection."""
        now = time.perf_counter()
        data = bytes(self._buffer[:nbytes])
        if self._answer is None:
            self.close()
        else:
            self._answer.feed(data, now)

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio calls it."""
        self.is_lost = True
        if self._answer is not None:
            self._answer.lose(exc)

    async def exchange(self, request: bytes, answer: Answer) -> None:
        """Send a request and wait for the end of its answer, of whatever kind."""
        assert self._transport
        self._answer = answer
        try:
            answer.sent_at = time.perf_counter()
            self._transport.write(request)
            if self.is_lost:
                answer.lose(None)
            await answer.ended
        finally:
            self._answer = None

    def close(self) -> None:
        """At once, whatever is on its way."""
        self.is_lost = True
        if self._transport:
            self._transport.abort()


class Pool:
    """Connections to the server at `url`, as many as are needed, kept for a while; a context manager.

    `headers` go with every request. OSError from `take` where no connection can be made.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(url.rstrip("/"))
        self._host, self._path = parts.hostname or "", parts.path
        self._context = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._context else 80)
        lines = {"Host": parts.netloc.rpartition("@")[2], "Accept-Encoding": "identity"} | dict(headers or {})
        self._lines = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._idle: deque[Connection] = deque()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.close()

    def post(self, path: str, body: bytes) -> bytes:
        """The request for a JSON body at `path`, which follows the URL's."""
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return f"POST {self._path}{path} HTTP/1.1\r\n{self._lines}{kind}\r\n".encode("latin-1") + body

    def get(self, path: str) -> bytes:
        """The request for what is at `path`."""
        return f"GET {self._path}{path} HTTP/1.1\r\n{self._lines}\r\n".encode("latin-1")

    async def take(self) -> Connection:
        """The connection that was given back last, or a new one."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_lost and time.perf_counter() - connection.idle_since < KEEP_ALIVE_SECONDS:
                return connection
            connection.close()
        loop, name = asyncio.get_running_loop(), self._host if self._context else None
        made = await loop.create_connection(Connection, self._host, self._port, ssl=self._context, server_hostname=name)
        return made[1]

    def give(self, connection: Connection) -> None:
        """To be used again."""
        connection.idle_since = time.perf_counter()
        self._idle.append(connection)
