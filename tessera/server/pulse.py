"""The engine process's sign of life, which goes on while a step runs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from types import TracebackType

import zmq

from tessera.server import ipc


class Pulse:
    """Says every BEAT_MS that the process runs and how long its step has; a context manager.

    The beats come from a thread with a socket of its own, since a ZeroMQ socket is for one thread and the
    engine's is in the step. A stopped process has no pulse.
    """

    def __init__(self, address: str) -> None:
        self._address = ipc.pulse_address(address)
        self._begun: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """What runs within is a step."""
        self._begun = time.monotonic()
        try:
            yield
        finally:
            self._begun = None

    def _beat(self) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.PUSH)
        socket.set_hwm(2)  # a beat that nobody reads is not worth keeping
        socket.connect(self._address)
        while not self._ended.wait(ipc.BEAT_MS / 1000):
            begun = self._begun
            beat = ipc.Beat(0.0 if begun is None else time.monotonic() - begun)
            with contextlib.suppress(zmq.Again):
                socket.send(ipc.encode(beat), flags=zmq.NOBLOCK)
        context.destroy(linger=0)
