"""Words between the API process and the engine process: msgspec-encoded, over one local socket.

The API process binds in a fresh directory that only its user may enter, the engine process connects.
Every message is one msgpack map with a type tag, those to the engine in a list; nothing else is ever decoded.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from tessera.config import EngineConfig
from tessera.errors import ConfigError
from tessera.types import EngineInfo, EngineStatus, Output, Request


class Start(msgspec.Struct, tag="start", frozen=True):
    """To the engine, first: build it like this."""

    config: EngineConfig
    log_level: str = "info"


class Add(msgspec.Struct, tag="add", frozen=True):
    """To the engine: generate this."""

    request: Request


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """To the engine: stop a request, or one sequence of it, and free its pages."""

    request_id: str
    index: int | None = None


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """To the engine: end the process."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """From the engine: it has started and this is what it is."""

    info: EngineInfo


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """From the engine: it could not start; `kind` is the name of the error's class."""

    message: str
    hint: str | None
    kind: str


class Report(msgspec.Struct, tag="report", frozen=True):
    """From the engine loop, between steps: what is new, and its counters.

    After every step with outputs, and at BEAT_MS or as soon after it as a step ends.
    """

    status: EngineStatus
    outputs: list[Output] = []
    at: float = msgspec.field(default_factory=time.monotonic)
    """When, by the clock that all processes of a machine share."""


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """From the engine: one request cannot be served; the others go on."""

    request_id: str
    message: str
    hint: str | None
    param: str | None


class Crashed(msgspec.Struct, tag="crashed", frozen=True):
    """From the engine: an unexpected error ended its loop."""

    message: str


class Beat(msgspec.Struct, tag="beat", frozen=True):
    """From the engine process, every BEAT_MS even within a step: it runs; its step has for so long (0: none)."""

    step_seconds: float


ToEngine = Start | Add | Abort | Stop
FromEngine = Ready | Failed | Report | Refused | Crashed | Beat

BEAT_MS = 500
"""An idle engine reports this often, a busy one after every step; beats always come this often."""

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(list[ToEngine]).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def pulse_address(address: str) -> str:
    """The socket for beats that belongs to the socket at `address`."""
    return f"{address}.pulse"


def remove_folder(address: str) -> None:
    """Remove the directory of a socket whose owner was killed."""
    shutil.rmtree(Path(address.removeprefix("ipc://")).parent, ignore_errors=True)


class EngineSocket:
    """The engine's end: blocking, for one thread."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # a full queue would block the engine behind a slow API process
        self._socket.connect(address)

    def receive(self, wait_ms: int | None) -> list[ToEngine]:
        """All messages that are there, waiting up to `wait_ms` for the first (None: for ever)."""
        messages: list[ToEngine] = []
        while self._socket.poll(0 if messages else wait_ms):
            messages += decode_to_engine(self._socket.recv())
        return messages

    def send(self, message: FromEngine) -> None:
        """Queue `message`."""
        self._socket.send(encode(message))

    def close(self) -> None:
        """Deliver what is queued, waiting a second at most, and close."""
        self._socket.close(linger=1000)
        self._context.term()


class ApiSocket:
    """The API process's end, for one event loop, in a private directory that `close` removes; it hears beats too.

    ConfigError where TMPDIR is too long for a socket.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tessera-", ignore_cleanup_errors=True)  # of mode 0700
        path = str(Path(self._folder.name) / "engine")
        if len(pulse_address(path).encode()) > zmq.IPC_PATH_MAX_LEN:
            self._folder.cleanup()
            raise ConfigError(
                f"the socket's path {path} is longer than the {zmq.IPC_PATH_MAX_LEN} bytes a socket may have",
                "set TMPDIR to a shorter directory",
            )
        self.address = f"ipc://{path}"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # bounded by max_queued_requests instead
        self._socket.bind(self.address)
        self._unsent: list[ToEngine] = []
        self._pulse = self._context.socket(zmq.PULL)
        self._pulse.set_hwm(2)
        self._pulse.bind(pulse_address(self.address))

    async def send(self, message: ToEngine) -> None:
        """Queue `message`, waiting until the engine process has connected."""
        await self._socket.send(encode([message]))

    def send_now(self, message: ToEngine) -> None:
        """Queue `message`, or drop it when no engine process is connected: its end is noticed elsewhere.

        It goes with all others of this turn of the event loop: a send wakes a thread, which costs more than a request.
        """
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._send_unsent)
        self._unsent.append(message)

    def _send_unsent(self) -> None:
        messages, self._unsent = self._unsent, []
        if self._socket.closed:
            return
        sent = self._socket.send(encode(messages), flags=zmq.NOBLOCK)
        if isinstance(sent, asyncio.Future) and not sent.cancel():
            sent.exception()  # already done: look at it, so that asyncio does not complain

    async def receive(self) -> FromEngine:
        """The engine's next message."""
        message: FromEngine = decode_from_engine(await self._socket.recv())
        return message

    async def receive_all(self) -> list[FromEngine]:
        """The engine's next message, and all that wait behind it: the engine does not wait for this process."""
        messages: list[FromEngine] = [await self.receive()]
        while True:
            waiting: Any = self._socket.recv(flags=zmq.NOBLOCK)  # a future that is done at once
            if waiting.exception() is not None:
                return messages
            messages.append(decode_from_engine(waiting.result()))

    async def receive_beat(self) -> list[FromEngine]:
        """The engine's next sign of life."""
        return [decode_from_engine(await self._pulse.recv())]

    def close(self) -> None:
        """Close the sockets and remove its directory; calling it twice is harmless."""
        self._context.destroy(linger=0)
        self._folder.cleanup()
