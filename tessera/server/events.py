"""Server-sent events, and what happens when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tessera.errors import TesseraError
from tessera.log import logger
from tessera.server.errors import ErrorBody, ErrorReply, reply_of
from tessera.server.generation import Generation

T = TypeVar("T")

encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream(Response):
    """Sends each chunk as `data: {json}` and a blank line, then `data: [DONE]`.

    A failure on the way is sent as `data: {"error":{...}}`, never as a mere end. When the client goes
    away, or when all is sent, the generation is left and so freed in the engine.
    """

    def __init__(self, generation: Generation, chunks: AsyncIterator[msgspec.Struct]) -> None:
        self.generation, self.chunks = generation, chunks
        self.status_code = 200
        self.background = None

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream (ASGI)."""
        with self.generation:
            await unless_disconnected(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        """Send what comes at once as one message: a message is a packet, which costs more than all before it."""
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        events: list[bytes] = []

        async def send_events() -> None:
            if events:
                data = b"".join(events)
                events.clear()
                await send({"type": "http.response.body", "body": data, "more_body": True})

        self.generation.before_waiting = send_events
        try:
            async for chunk in self.chunks:
                events.append(_event(encode(chunk)))  # noqa: PERF401 -- sent as they come
        except TesseraError as error:
            events.append(_event(encode(reply_of(error))))
        except Exception:
            logger.exception("a stream failed")
            failure = ErrorBody("an unexpected error happened in the server", "server_error", None, "internal_error")
            events.append(_event(encode(ErrorReply(failure))))
        events.append(DONE)
        await send({"type": "http.response.body", "body": b"".join(events), "more_body": False})


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, which is cancelled when the client goes away first (None then)."""
    worker = asyncio.current_task()
    assert worker is not None
    gone = False

    def on_end(_watcher: asyncio.Task[None]) -> None:
        nonlocal gone
        gone = True
        worker.cancel()

    watcher = asyncio.create_task(_disconnect(receive))
    watcher.add_done_callback(on_end)
    try:
        return await work
    except asyncio.CancelledError:
        if gone and not worker.uncancel():  # nobody else asks for the end
            return None
        raise
    finally:
        watcher.remove_done_callback(on_end)
        watcher.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
