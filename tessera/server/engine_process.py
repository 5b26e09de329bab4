"""The engine process: builds the engine, then steps it for the API process that started it.

Run as `python -m tessera.server.engine_process ADDRESS` with a pipe as stdin that its parent never
writes to: the pipe ends when the parent does, however it died, and this process with it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Protocol

from tessera import log
from tessera.config import EngineConfig
from tessera.engine.garbage import keep_what_is_there
from tessera.errors import RequestError, TesseraError
from tessera.log import logger
from tessera.server import ipc
from tessera.server.pulse import Pulse
from tessera.types import EngineInfo, EngineStatus, Output, Request


class Engine(Protocol):
    """What the loop needs of `tessera.engine.engine.Engine`."""

    info: EngineInfo

    @property
    def has_work(self) -> bool:
        """Whether a step would compute or report anything."""

    def add(self, request: Request) -> None:
        """Queue a request; RequestError when it cannot be served."""

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request, or one sequence of it."""

    def step(self) -> list[Output]:
        """Compute one step."""

    def status(self) -> EngineStatus:
        """Counters."""


def build(config: EngineConfig) -> Engine:
    """The real engine; torch is imported here."""
    from tessera.engine.build import build_engine

    return build_engine(config, progress=sys.stderr.isatty())


def run(address: str) -> int:
    """Serve the API process at `address` until it says stop; returns the exit code."""
    socket = ipc.EngineSocket(address)
    try:
        engine = start(socket)
        if engine is None:
            return 1
        with Pulse(address) as pulse, keep_what_is_there():
            return serve(engine, socket, pulse)
    finally:
        socket.close()


def start(socket: ipc.EngineSocket) -> Engine | None:
    """Wait for Start, build the engine and say Ready; None after saying Failed."""
    message = socket.receive(None)[0]
    assert isinstance(message, ipc.Start), message
    log.set_up(message.log_level)
    try:
        engine = build(message.config)
    except TesseraError as error:
        socket.send(ipc.Failed(error.message, error.hint, type(error).__name__))
        return None
    except Exception as error:
        logger.exception("the engine could not be built")
        socket.send(ipc.Failed(f"the engine could not be built: {describe(error)}", None, "EngineDeadError"))
        return None
    socket.send(ipc.Ready(engine.info))
    return engine


def serve(engine: Engine, socket: ipc.EngineSocket, pulse: Pulse) -> int:
    """Take requests, step, report, until told to stop (0) or an unexpected error (1)."""
    last_report = 0.0
    try:
        while True:
            for message in socket.receive(0 if engine.has_work else ipc.BEAT_MS):
                if isinstance(message, ipc.Stop):
                    return 0
                obey(message, engine, socket)
            with pulse.step():
                outputs = engine.step() if engine.has_work else []
            now = time.monotonic()
            if outputs or not engine.has_work or now - last_report >= ipc.BEAT_MS / 1000:
                socket.send(ipc.Report(engine.status(), outputs))
                last_report = now
    except Exception as error:
        logger.exception("the engine stopped on an unexpected error")
        socket.send(ipc.Crashed(describe(error)))
        return 1


def obey(message: ipc.ToEngine, engine: Engine, socket: ipc.EngineSocket) -> None:
    """Add or abort; a request that the engine refuses is reported and nothing else is touched."""
    if isinstance(message, ipc.Abort):
        engine.abort(message.request_id, message.index)
    elif isinstance(message, ipc.Add):
        try:
            engine.add(message.request)
        except RequestError as error:
            refused = ipc.Refused(message.request.request_id, error.message, error.hint, error.param)
            socket.send(refused)


def describe(error: Exception) -> str:
    """An unexpected error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def die_with_parent(address: str) -> None:
    """End this process, whatever it is doing, as soon as the parent's end of stdin closes; leave no socket behind."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        ipc.remove_folder(address)
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def main() -> None:
    """Entry point of the process."""
    die_with_parent(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the API process, which then says Stop
    sys.exit(run(sys.argv[1]))


if __name__ == "__main__":
    main()
