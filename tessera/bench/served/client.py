"""An HTTP client that measures streamed answers: when each token came, and what its own work cost.

Times are `time.perf_counter()`, in seconds since the load's start. A token's time is that of the read in which its
chunk came. An answer that is broken in any way carries its error in words and is never a figure.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec

from tessera.bench.served.stream import Stream, StreamError, TokenCounts

KEEP_ALIVE_SECONDS = 2.0
"""An idle connection is used again for so long; servers close theirs after 5 s (uvicorn) or more."""
LEAD_SECONDS = 0.05
"""Between the making of an open loop's tasks and its clock, so that the first call is not late."""


@dataclass(frozen=True)
class Call:
    """One request to send; ValueError for a body that asks for several texts, whose tokens nobody could tell apart."""

    index: int
    prompt: str | list[int]
    max_tokens: int
    at_s: float = 0.0
    """When an open loop sends it, from the load's start."""
    messages: bool = False
    """To the chat endpoint, as one user message, in place of /v1/completions; the prompt must be a text then."""
    fields: dict[str, Any] = field(default_factory=dict)
    """More of the body: temperature, seed, ignore_eos, ..."""

    def __post_init__(self) -> None:
        if self.fields.get("n", 1) != 1:
            raise ValueError(f"call {self.index} asks for n = {self.fields['n']} texts, only one can be measured")
        if self.messages and not isinstance(self.prompt, str):
            raise ValueError(f"call {self.index} sends token ids as a message; a chat takes text")


@dataclass(frozen=True)
class Reply:
    """What came back for one call."""

    index: int
    due_s: float
    """When it was to be sent: its time in an open loop, in a closed one when its place became free."""
    sent_s: float
    """When its first byte was written to a connection; making one, where none is idle, comes before and is lag."""
    token_s: list[float]
    """Arrival of each token; tokens of one chunk share its time, and `latency.itl_ms` shares its gap among them."""
    end_s: float
    """Arrival of the stream's end, or the moment of failure."""
    prompt_tokens: int
    output_tokens: int
    finish_reason: str | None
    error: str = ""
    token_counts: TokenCounts = "per chunk"
    """Whether the server told the tokens of each chunk, or those of the whole were spread over its chunks."""
    cached_tokens: int | None = None
    """Of the prompt, found in the server's prefix cache; None where it does not say."""

    @property
    def ok(self) -> bool:
        """Whether it may be counted."""
        return not self.error


@dataclass(frozen=True)
class Load:
    """All replies of one load, in the order of the calls, and what the client itself did meanwhile."""

    replies: list[Reply]
    seconds: float
    """From the load's start to the end of its last reply."""
    client_cpu: float
    """Share of one core that this process used, all its threads together."""
    lag_s: float
    """The most that a call was sent later than it was due."""

    @property
    def failed(self) -> list[Reply]:
        """Replies that are not figures."""
        return [reply for reply in self.replies if not reply.ok]


@dataclass
class _Marks:
    """When a request was handed to aiohttp and, once it has been, written to a connection."""

    sent: float


@dataclass
class Dialect:
    """What a server turned out to understand; shared by all loads on it, so that it need refuse once only."""

    usage_per_chunk: bool = True


async def send(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    call: Call,
    started: float,
    *,
    due_s: float | None = None,
    dialect: Dialect | None = None,
) -> Reply:
    """Send one call and read its stream to the end; never raises for what the server does.

    `url` ends in /v1, `started` is the load's start by `time.perf_counter()`. A server that refuses
    `continuous_usage_stats` by name is asked once more without it, and the clock starts with the second asking.
    """
    dialect = dialect or Dialect()
    target = url.rstrip("/") + ("/chat/completions" if call.messages else "/completions")
    stream, error, marks = Stream(), "", _Marks(0.0)
    for per_chunk in (True, False):
        if per_chunk and not dialect.usage_per_chunk:
            continue
        body = _body(call, model, per_chunk)
        stream, marks = Stream(), _Marks(time.perf_counter())
        error = await _read(session, target, body, stream, marks)
        if not (per_chunk and error.startswith("HTTP 4") and _refuses_usage(error)):
            break
        dialect.usage_per_chunk = False
    error = error or stream.problem(call.max_tokens if call.fields.get("ignore_eos") else None)
    times, counts = stream.tokens()
    sent_s = marks.sent - started
    return Reply(
        index=call.index,
        due_s=sent_s if due_s is None else due_s,
        sent_s=sent_s,
        token_s=[at - started for at in times],
        end_s=(stream.done_at or time.perf_counter()) - started,
        prompt_tokens=stream.prompt_tokens,
        output_tokens=stream.output_tokens,
        finish_reason=stream.finish_reason,
        error=error,
        token_counts=counts,
        cached_tokens=stream.cached_tokens,
    )


def _body(call: Call, model: str, per_chunk: bool) -> bytes:
    options = {"include_usage": True} | ({"continuous_usage_stats": True} if per_chunk else {})
    body = {"model": model, "max_tokens": call.max_tokens, "stream": True, "stream_options": options} | call.fields
    what = {"messages": [{"role": "user", "content": call.prompt}]} if call.messages else {"prompt": call.prompt}
    return msgspec.json.encode(body | what)


def _refuses_usage(error: str) -> bool:
    return "continuous_usage_stats" in error or "stream_options" in error


async def _read(session: aiohttp.ClientSession, target: str, body: bytes, stream: Stream, marks: _Marks) -> str:
    """Feed `stream` with the answer; what went wrong on the way, or ''."""
    kind = {"Content-Type": "application/json"}
    try:
        async with session.post(target, data=body, headers=kind, trace_request_ctx=marks) as response:
            if response.status != 200:
                return f"HTTP {response.status}: {(await response.text())[:400]}"
            if "text/event-stream" not in response.headers.get("content-type", ""):
                return f"the answer is {response.headers.get('content-type')}, not an event stream"
            async for data in response.content.iter_any():
                stream.feed(data, time.perf_counter())
    except TimeoutError:
        return f"no end within {session.timeout.total:g} s"
    except StreamError as error:
        return str(error)
    except (aiohttp.ClientError, OSError, UnicodeError) as error:
        return f"the connection broke: {type(error).__name__}: {error}"
    return ""


def new_session(timeout_s: float, headers: Mapping[str, str] | None = None) -> aiohttp.ClientSession:
    """Connections as many as needed, kept for a while, and the moment noted at which each request goes out."""

    async def note(_session: aiohttp.ClientSession, context: SimpleNamespace, _what: object) -> None:
        context.trace_request_ctx.sent = time.perf_counter()

    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(note)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        headers=dict(headers or {}),
        trace_configs=[trace],
    )


async def open_loop(
    url: str,
    model: str,
    calls: Sequence[Call],
    *,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
    dialect: Dialect | None = None,
) -> Load:
    """Send each call at its time, whatever has become of the others."""
    dialect = dialect or Dialect()

    async def run(session: aiohttp.ClientSession, started: float) -> list[Reply]:
        async def one(call: Call) -> Reply:
            await asyncio.sleep(max(0.0, started + call.at_s - time.perf_counter()))
            return await send(session, url, model, call, started, due_s=call.at_s, dialect=dialect)

        return list(await asyncio.gather(*(one(call) for call in calls)))

    return await _load(run, timeout_s, headers, LEAD_SECONDS)


async def closed_loop(
    url: str,
    model: str,
    calls: Sequence[Call],
    concurrency: int,
    *,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
    dialect: Dialect | None = None,
) -> Load:
    """Keep `concurrency` calls in flight until all are sent; `at_s` of the calls plays no part."""
    dialect = dialect or Dialect()

    async def run(session: aiohttp.ClientSession, started: float) -> list[Reply]:
        waiting, replies = deque(calls), dict[int, Reply]()

        async def place() -> None:
            free = 0.0
            while waiting:
                call = waiting.popleft()
                reply = await send(session, url, model, call, started, due_s=free, dialect=dialect)
                replies[id(call)], free = reply, reply.end_s

        await asyncio.gather(*(place() for _ in range(min(concurrency, len(calls)))))
        return [replies[id(call)] for call in calls]

    return await _load(run, timeout_s, headers, 0.0)


async def _load(
    run: Callable[[aiohttp.ClientSession, float], Awaitable[list[Reply]]],
    timeout_s: float,
    headers: Mapping[str, str] | None,
    lead_s: float,
) -> Load:
    async with new_session(timeout_s, headers) as session:
        with _no_collection():
            began, busy = time.perf_counter(), time.process_time()
            replies = await run(session, began + lead_s)
            wall, busy = time.perf_counter() - began, time.process_time() - busy
    return Load(
        replies,
        seconds=max((reply.end_s for reply in replies), default=0.0),
        client_cpu=busy / wall,
        lag_s=max((reply.sent_s - reply.due_s for reply in replies), default=0.0),
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: with torch loaded, one takes longer than many a gap between tokens."""
    was = gc.isenabled()
    _set_aside()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@cache
def _set_aside() -> None:
    """What is there before the first load, modules above all, is not looked at by later collections."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or the end of the process would find it unowned
