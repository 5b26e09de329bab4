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
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        try:
            async for chunk in self.chunks:
                await send(_event(msgspec.json.encode(chunk)))
        except TesseraError as error:
            await send(_event(msgspec.json.encode(reply_of(error))))
        except Exception:
            logger.exception("a stream failed")
            failure = ErrorBody("an unexpected error happened in the server", "server_error", None, "internal_error")
            await send(_event(msgspec.json.encode(ErrorReply(failure))))
        await send(_event(b"[DONE]"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, which is cancelled when the client goes away first (None then)."""
    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        return job.result() if job.done() else None
    finally:
        job.cancel()
        gone.cancel()
        await asyncio.gather(job, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
