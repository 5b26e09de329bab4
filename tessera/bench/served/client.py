"""An HTTP client that measures streamed answers: when each token came, and what its own work cost.

Times are `time.perf_counter()`, in seconds since the load's start. A token's time is that of the read in which its
chunk came. While a load runs reads are only noted, with their times; what they say is found out afterwards. An answer
that is broken in any way carries its error in words and is never a figure.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from tessera.bench.served.answers import plain_cause
from tessera.bench.served.http import Answer, Connection, Pool
from tessera.bench.served.load import Call, Dialect, Load, Reply
from tessera.bench.served.loop import no_collection, sleep_until, watch
from tessera.bench.served.stream import Stream, StreamError

LEAD_SECONDS = 0.05
"""Between the making of an open loop's tasks and its clock, so that the first call is not late."""
AHEAD_SECONDS = 0.02
"""Before a call of an open loop is due it gets its connection."""
REHEARSAL_SECONDS = 5.0
MAX_HELD_BYTES = 1 << 28
"""Of answers that nobody has looked into yet; once there are more, each is looked into at its end."""


class Gate:
    """When the clock of a load starts, and what is waited for when it is over: nothing, for a client in one process."""

    def __init__(self, lead_s: float) -> None:
        """`lead_s`: between the making of tasks and the clock."""
        self._lead_s = lead_s

    def start(self) -> float:
        """Called when all is ready; when the clock starts, by `time.perf_counter()`."""
        return time.perf_counter() + self._lead_s

    def over(self) -> None:
        """Called when all answers have ended, before anything is made of them."""


@dataclass
class _Sent:
    """A call that was sent, or could not be, and what came."""

    call: Call
    due_s: float
    answer: Answer

    def reply(self, started: float) -> Reply:
        """What the bytes say; first of all what is wrong with them."""
        stream, answer = Stream(), self.answer
        error = _refusal(answer)
        try:
            for at, data in [] if error else answer.reads:
                stream.feed(data, at)
        except (StreamError, UnicodeError) as problem:
            error = str(problem)
        exactly = self.call.max_tokens if self.call.fields.get("ignore_eos") else None
        error = error or answer.error or stream.problem(exactly)
        times, counts = stream.tokens()
        return Reply(
            index=self.call.index,
            due_s=self.due_s,
            sent_s=answer.sent_at - started,
            token_s=[at - started for at in times],
            end_s=(stream.done_at or answer.ended_at) - started,
            prompt_tokens=stream.prompt_tokens,
            output_tokens=stream.output_tokens,
            finish_reason=stream.finish_reason,
            error=error,
            token_counts=counts,
            cached_tokens=stream.cached_tokens,
        )


def _refusal(answer: Answer) -> str:
    """What a complete answer that is no event stream is instead; '' for one that is, or that never began."""
    if not answer.status or (answer.error and not answer.reads):
        return ""
    if answer.status != 200:
        return f"HTTP {answer.status}: {answer.body.decode('utf-8', 'replace')[:400]}"
    kind = answer.headers.get("content-type")
    return "" if kind and "text/event-stream" in kind else f"the answer is {kind}, not an event stream"


class Client:
    """Sends the calls of one load from one process, once."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        dialect: Dialect | None = None,
    ) -> None:
        """`url` ends in /v1. A server that refuses `continuous_usage_stats` by name is asked once more without it, and
        the clock starts with the second asking; `dialect` remembers that.
        """
        self._pool, self._model, self._timeout_s = Pool(url, headers), model, timeout_s
        self._dialect = dialect or Dialect()
        self._requests: dict[int, bytes] = {}
        self._is_prepared_to_ask = True
        self._started = 0.0
        self._num_held = 0

    async def open_loop(self, calls: Sequence[Call], gate: Gate | None = None) -> Load:
        """Send each call at its time, whatever has become of the others."""

        async def one(call: Call) -> Reply | _Sent:
            due = self._started + call.at_s
            await sleep_until(due - AHEAD_SECONDS)
            connection = await self._take()
            await sleep_until(due)
            return self._held(await self._send(call, connection, call.at_s))

        async def all_of_them() -> list[Reply | _Sent]:
            return list(await asyncio.gather(*(one(call) for call in calls)))

        return await self._load(calls, 1, gate or Gate(LEAD_SECONDS), all_of_them)

    async def closed_loop(self, calls: Sequence[Call], concurrency: int, gate: Gate | None = None) -> Load:
        """Keep `concurrency` calls in flight until all are sent; `at_s` of the calls plays no part."""
        waiting, found = deque(enumerate(calls)), dict[int, Reply | _Sent]()

        async def place() -> None:
            free = 0.0
            await sleep_until(self._started)
            while waiting:
                index, call = waiting.popleft()
                sent = await self._send(call, await self._take(), free)
                found[index], free = self._held(sent), sent.answer.ended_at - self._started

        async def all_of_them() -> list[Reply | _Sent]:
            await asyncio.gather(*(place() for _ in range(min(concurrency, len(calls)))))
            return [found[index] for index in range(len(calls))]

        return await self._load(calls, concurrency, gate or Gate(0.0), all_of_them)

    async def _load(
        self,
        calls: Sequence[Call],
        num_connections: int,
        gate: Gate,
        work: Callable[[], Awaitable[list[Reply | _Sent]]],
    ) -> Load:
        self._is_prepared_to_ask = self._dialect.usage_per_chunk
        self._requests = {id(call): self._request(call) for call in calls}
        with self._pool:
            await asyncio.gather(*(self._rehearse() for _ in range(min(num_connections, len(calls)))))
            with no_collection():
                self._started, late = gate.start(), list[float]()
                watcher = asyncio.create_task(watch(self._started, late))
                began, busy = time.perf_counter(), time.process_time()
                sent = await work()
                wall, busy = time.perf_counter() - began, time.process_time() - busy
                watcher.cancel()
                gate.over()
        replies = [each if isinstance(each, Reply) else each.reply(self._started) for each in sent]
        return Load(
            replies,
            seconds=max((reply.end_s for reply in replies), default=0.0),
            client_cpu=busy / wall,
            lag_s=max((reply.sent_s - reply.due_s for reply in replies), default=0.0),
            wake_s=late,
            client_cpu_total=busy / wall,
        )

    async def _rehearse(self) -> None:
        """Make a connection and send a request that computes nothing, so that no call is the first of anything."""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(min(REHEARSAL_SECONDS, self._timeout_s)):
                connection, answer = await self._pool.take(), Answer()
                await connection.exchange(self._pool.get("/models"), answer)
                self._done_with(connection, answer)

    async def _take(self) -> Connection | OSError:
        """A connection, or why there is none."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._pool.take()
        except TimeoutError:
            return OSError(f"no connection within {self._timeout_s:g} s")
        except OSError as error:
            return error

    async def _send(self, call: Call, connection: Connection | OSError, due_s: float) -> _Sent:
        """Send a call and read its stream to the end; never raises for what the server does."""
        request, asks = self._requests[id(call)], self._dialect.usage_per_chunk
        if not asks and self._is_prepared_to_ask:  # what was prepared asks for what another call found refused
            request = self._request(call)
        answer = await self._exchange(request, connection)
        if asks and 400 <= answer.status < 500 and _refuses_usage(answer.body):
            self._dialect.usage_per_chunk = False
            answer = await self._exchange(self._request(call), await self._take())
        return _Sent(call, due_s, answer)

    async def _exchange(self, request: bytes, connection: Connection | OSError) -> Answer:
        answer = Answer()
        if isinstance(connection, Connection) and connection.is_lost:
            connection = await self._take()
        if isinstance(connection, OSError):
            answer.sent_at = time.perf_counter()
            answer.end(f"the connection broke: {plain_cause(connection)}")
            return answer
        try:
            async with asyncio.timeout(self._timeout_s):
                await connection.exchange(request, answer)
        except TimeoutError:
            answer.end(f"no end within {self._timeout_s:g} s")
        self._done_with(connection, answer)
        return answer

    def _done_with(self, connection: Connection, answer: Answer) -> None:
        if answer.may_follow:
            self._pool.give(connection)
        else:
            connection.close()

    def _held(self, sent: _Sent) -> Reply | _Sent:
        """As it is, to be looked into when the load is over; what it says, where too much is held already."""
        if self._num_held > MAX_HELD_BYTES:
            return sent.reply(self._started)
        self._num_held += sum(len(data) for _, data in sent.answer.reads)
        return sent

    def _request(self, call: Call) -> bytes:
        more = {"continuous_usage_stats": True} if self._dialect.usage_per_chunk else {}
        options = {"include_usage": True} | more
        body = {"model": self._model, "max_tokens": call.max_tokens, "stream": True, "stream_options": options}
        what = {"messages": [{"role": "user", "content": call.prompt}]} if call.messages else {"prompt": call.prompt}
        path = "/chat/completions" if call.messages else "/completions"
        return self._pool.post(path, msgspec.json.encode(body | call.fields | what))


def _refuses_usage(body: bytes) -> bool:
    return b"continuous_usage_stats" in body or b"stream_options" in body
