"""The API process's side of the engine process: start it, watch it, and stream what it computes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence

from tessera import errors
from tessera.config import EngineConfig, ServerConfig
from tessera.errors import EngineDeadError, RequestError
from tessera.log import logger
from tessera.server import ipc
from tessera.server.errors import ShutdownError, TooManyRequestsError, UnavailableError
from tessera.server.latency import Latency
from tessera.server.output_stream import OutputStream
from tessera.types import EngineInfo, EngineStatus, Request

PROGRAM = (sys.executable, "-P", "-m", "tessera.server.engine_process")
"""How the engine process is started; -P keeps the working directory off its import path."""

MIN_WORK_SECONDS = 0.002
"""Sending what has come may take this long without a rest after it."""
MAX_REST_SECONDS = 0.005
"""The longest rest, which makes tokens later: chunks beside it are then of several steps anyway."""
WOKEN_AT_ONCE = 8
"""Streams that send before requests that have come are looked at: a request takes several turns of the event loop, and
256 streams keep it for ten milliseconds."""
STOP_SECONDS = 3.0
"""A stopping engine that is still in a step after this long is killed."""
STEP_PATIENCE = 10
"""A step of an engine that gives signs of life may take this many times engine_timeout."""
LONG_STEP_HINT = (
    "a smaller --max-num-batched-tokens makes steps shorter, a larger --engine-timeout waits for longer ones"
)


class EngineClient:
    """One engine process: its state is read here, never asked of it, so that reading cannot hang."""

    def __init__(self, config: EngineConfig, server: ServerConfig, *, program: Sequence[str] = PROGRAM) -> None:
        self.config, self.server, self._program = config, server, program
        self._socket = ipc.ApiSocket()
        self._streams: dict[str, OutputStream] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._last_heard = time.monotonic()
        self._hung: str | None = None
        self._ended: str | None = None
        self._stopping: ShutdownError | None = None
        self._process: asyncio.subprocess.Process | None = None
        self.dead = asyncio.Event()
        self.status = EngineStatus()
        self.peak_pages = 0
        self.latency = Latency()
        self.num_unfinished = 0
        """Sequences of open streams of which more is to come; the streams count."""

    async def start(self, log_level: str = "info") -> EngineInfo:
        """Start the process and wait until the engine is built; the error it reports is raised here."""
        process = self._process = await asyncio.create_subprocess_exec(
            *self._program, self._socket.address, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        first = asyncio.create_task(self._first_message(log_level))
        exit_code = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({first, exit_code}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({first}, timeout=0.2)  # of a process that ended: its last word may be on the way
        finally:
            first.cancel()
        if not first.done():
            raise EngineDeadError(f"the engine process {_exit_text(exit_code.result())} while it started")
        self.info = _info_of(first.result())
        self.status = EngineStatus(pages_total=self.info.num_pages, pages_free=self.info.num_pages)
        self._last_heard = time.monotonic()
        receiving = (self._receive(self._socket.receive_all), self._receive(self._socket.receive_beat))
        self._tasks = [asyncio.create_task(part) for part in (*receiving, self._watch(), self._wait(exit_code))]
        for task in self._tasks:
            task.add_done_callback(self._on_end)
        return self.info

    @property
    def pid(self) -> int | None:
        """Process id of the engine."""
        return self._process.pid if self._process else None

    def problem(self) -> str | None:
        """Why the engine cannot serve now; None when it can."""
        return self._ended or self._hung

    def open(self, requests: Sequence[Request]) -> OutputStream:
        """Send `requests` to the engine, if `admit` does; use the stream as a context manager."""
        self.admit(sum(request.params.n for request in requests))
        stream = OutputStream(self, requests)
        for request in requests:
            self._streams[request.request_id] = stream
            self._socket.send_now(ipc.Add(request))
        return stream

    def admit(self, num_new: int) -> None:
        """Whether `num_new` more sequences may be sent now.

        Raises ShutdownError after `shut_down`, UnavailableError when the engine is dead or hung,
        TooManyRequestsError when the queue is full, and RequestError when even an empty one could not hold them.
        """
        if self._stopping:
            raise ShutdownError(self._stopping.message)
        if problem := self.problem():
            raise UnavailableError(problem)
        limit = self.server.max_queued_requests
        if num_new > limit:
            raise RequestError(
                f"this call asks for {num_new} sequences (prompts times n), at most {limit} are taken",
                "split it, or serve with a larger --max-queued-requests",
            )
        if self.num_unfinished + num_new > limit:
            raise TooManyRequestsError(
                f"{self.num_unfinished} sequences are queued or running and this call has {num_new}, at most {limit} "
                "are taken",
                "try again later",
            )

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Have the engine stop a request or one sequence of it."""
        self._socket.send_now(ipc.Abort(request_id, index))

    def forget(self, request_ids: set[str]) -> None:
        """Stop requests whose outputs nobody reads any more."""
        for request_id in request_ids:
            self.release(request_id)
            self.abort(request_id)

    def release(self, request_id: str) -> None:
        """Take no more outputs of a request."""
        self._streams.pop(request_id, None)

    def fail_all(self, failure: EngineDeadError) -> None:
        """End every stream with an error like this one."""
        for stream in list(self._streams.values()):
            stream.fail(type(failure)(failure.message, failure.hint))  # one each, for each gets its own traceback

    def shut_down(self) -> None:
        """End every stream, and refuse whatever is opened from here on, because the server was told to stop."""
        self._stopping = ShutdownError("the server is shutting down")
        self.fail_all(self._stopping)

    async def stop(self) -> None:
        """End the process, by force if it does not answer, and remove the socket."""
        for task in self._tasks:
            task.cancel()
        process = self._process
        if process and process.returncode is None:
            await self._end_process(process)
        self._socket.close()

    async def _end_process(self, process: asyncio.subprocess.Process) -> None:
        if self._tasks:  # it has started, so it listens, at the latest after its step
            self._socket.send_now(ipc.Stop())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
                return
        process.kill()
        await process.wait()

    async def _first_message(self, log_level: str) -> ipc.FromEngine:
        await self._socket.send(ipc.Start(self.config, log_level))
        return await self._socket.receive()

    async def _receive(self, next_messages: Callable[[], Awaitable[list[ipc.FromEngine]]]) -> None:
        """Take what the engine says; where sending it takes longer than a step, for half the time at most.

        A chunk costs what tens of tokens cost, so with larger ones half the time does, and the rest is left to others.
        """
        while True:
            messages = await next_messages()
            begun = time.monotonic()
            streams = [stream for message in messages for stream in self._take(message)]
            streams.sort(key=lambda stream: stream.begun)  # those whose first tokens have come are first
            for place in range(0, max(1, len(streams)), WOKEN_AT_ONCE):
                for stream in streams[place : place + WOKEN_AT_ONCE]:
                    stream.wake()
                await asyncio.sleep(0)  # the turn of these, which send what has come, and of new requests
            spent = time.monotonic() - begun
            if len(messages) > 1 and spent > MIN_WORK_SECONDS:
                await asyncio.sleep(min(spent, MAX_REST_SECONDS))

    def _take(self, message: ipc.FromEngine) -> list[OutputStream]:
        """Hand on what the engine says; the streams that are to be woken for it."""
        woken: list[OutputStream] = []
        self._last_heard = time.monotonic()
        if isinstance(message, ipc.Beat) and message.step_seconds > STEP_PATIENCE * self.server.engine_timeout:
            self._give_up(f"the engine's step has run for {message.step_seconds:.0f} s", LONG_STEP_HINT)
            return woken
        self._hung = None
        if isinstance(message, ipc.Report):
            self.status = message.status
            self.peak_pages = max(self.peak_pages, message.status.pages_total - message.status.pages_free)
            for output in message.outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None and stream.put(output, message.at):
                    woken.append(stream)
        elif isinstance(message, ipc.Refused):
            if stream := self._streams.get(message.request_id):
                stream.fail(RequestError(message.message, message.hint, message.param))
        elif isinstance(message, ipc.Crashed):
            self._end(f"the engine stopped on an unexpected error: {message.message}")
        return woken

    async def _watch(self) -> None:
        """Notice an engine process that exists but says nothing."""
        limit = self.server.engine_timeout
        while True:
            heard = self._last_heard
            await asyncio.sleep(min(1.0, limit / 4))
            # unchanged across a sleep: otherwise this process itself may have been the one that slept
            if self._last_heard == heard and time.monotonic() - heard > limit:
                self._give_up(f"the engine process has said nothing for {limit:g} s")

    def _give_up(self, problem: str, hint: str | None = None) -> None:
        """Fail what runs, and what comes until the engine is heard of again."""
        if self._hung is None:
            logger.error("%s; its requests are given up", problem)
            self.fail_all(EngineDeadError(problem, hint))
        self._hung = problem

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """A task that fails takes the engine with it: nobody would hear it any more."""
        if not task.cancelled() and (error := task.exception()):
            logger.error("reading from the engine failed", exc_info=error)
            self._end(f"reading from the engine failed: {type(error).__name__}: {error}"[:500])

    async def _wait(self, exit_code: asyncio.Task[int]) -> None:
        """Notice the end of the process."""
        code = await exit_code
        await asyncio.sleep(0.1)  # its last words come first
        self._end(f"the engine process {_exit_text(code)}")

    def _end(self, reason: str) -> None:
        if self._ended is None:
            logger.error("%s", reason)
            self._ended = reason
            self.fail_all(EngineDeadError(reason))
            self.dead.set()


def _info_of(message: ipc.FromEngine) -> EngineInfo:
    if isinstance(message, ipc.Ready):
        return message.info
    assert isinstance(message, ipc.Failed), message
    kinds = (errors.ConfigError, errors.ModelError, errors.CapacityError, errors.BackendError)
    kind = next((k for k in kinds if k.__name__ == message.kind), EngineDeadError)
    raise kind(message.message, message.hint)


def _exit_text(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
