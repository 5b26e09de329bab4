"""What a client may send before it is known, and for how long: real sockets, and an application of three lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from tessera.server import connection
from tessera.server.connection import MAX_HEAD_BYTES, Connection


async def count_body(_scope: Any, receive: Any, send: Any) -> None:
    """Answers how many bytes the body has."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"7")]})
    await send({"type": "http.response.body", "body": b"%07d" % size})


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = uvicorn.Config(count_body, log_config=None, lifespan="off", ws="none")
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield reader, writer
        finally:
            writer.close()


def refused_with(start: bytes, more: bytes = b"") -> tuple[int, dict[str, Any]]:
    """Status and error of what answers `start`, and `more` a little later, before the connection is closed."""

    async def talk() -> tuple[int, dict[str, Any]]:
        async with connected() as (reader, writer):
            writer.write(start)
            if more:
                await asyncio.sleep(0.1)
                writer.write(more)
            answer = await asyncio.wait_for(reader.read(), 5)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"connection: close" in head
            return int(head.split()[1]), json.loads(body)["error"]

    return asyncio.run(talk())


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /", b"a"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: ", b"a"),
        (b"GET / HTTP/1.1\r\n", b"X: a\r\n"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"a"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: ", b"a"),
    ],
    ids=["path", "header", "headers", "chunk's extension", "trailer"],
)
def test_what_is_no_body_and_does_not_end_is_answered_431(start: bytes, more: bytes) -> None:
    status, error = refused_with(start, more * (MAX_HEAD_BYTES // len(more) + 1))
    assert status == 431
    assert error["code"] == "headers_too_large" and f"{MAX_HEAD_BYTES} bytes" in error["message"]


def test_a_head_that_comes_at_once_may_not_be_larger_either() -> None:
    assert refused_with(b"GET / HTTP/1.1\r\nX: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n")[0] == 431


@pytest.mark.parametrize(
    "start", [b"GET / HT", b"POST / HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"], ids=["head", "body"]
)
def test_a_request_that_does_not_come_is_answered_408(monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.2)
    status, error = refused_with(start)
    assert status == 408
    assert error["code"] == "request_timeout" and "0.2 s" in error["message"]


def test_what_is_no_http_is_answered_as_every_other_error() -> None:
    status, error = refused_with(b"\x16\x03\x01 hello\r\n\r\n")
    assert status == 400
    assert error["type"] == "invalid_request_error"


def test_bodies_of_any_length_and_requests_one_after_the_other_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of any size, for longer together than one of them may take, beside heads that nearly fill the room."""
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.4)

    async def talk() -> list[bytes]:
        async with connected() as (reader, writer):
            answers = []
            for size in (0, 5, 4 * MAX_HEAD_BYTES, 1, 2, 3):
                padding = b"X: " + b"a" * (MAX_HEAD_BYTES - 200)
                head = b"POST / HTTP/1.1\r\n%s\r\nContent-Length: %d\r\n\r\n" % (padding, size)
                request = head + b"b" * size
                for first in range(0, len(request), 30_000):
                    writer.write(request[first : first + 30_000])
                    await writer.drain()
                await asyncio.sleep(0.1)
                answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
                assert answer.startswith(b"HTTP/1.1 200"), answer
                answers.append(await reader.readexactly(7))
            return answers

    assert [int(answer) for answer in asyncio.run(talk())] == [0, 5, 4 * MAX_HEAD_BYTES, 1, 2, 3]
