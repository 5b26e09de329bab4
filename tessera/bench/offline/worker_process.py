"""A worker as its parent sees it: a process that is asked over a pipe and may fail in every way a process can."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from tessera.bench.served.parent import end_with_parent

STDERR_LINES = 5
STOP_SECONDS = 15.0
OF_ITS_PROCESS = re.compile(r"^\(\w+ pid=\d+\) (?:.*\] )?([A-Za-z_][\w.]*(?:Error|Exception)\b.*)$")
"""The last line of a traceback as vLLM writes that of its engine's process: `(EngineCore pid=7) ValueError: why`."""


class WorkerError(Exception):
    """A worker that refused, died or hung; the message says which, with the end of what it wrote to stderr."""

    def __init__(self, message: str, *, unavailable: bool = False, no_memory: bool = False) -> None:
        super().__init__(message)
        self.unavailable = unavailable
        """Whether its library is not installed."""
        self.no_memory = no_memory
        """Whether there was too little memory for it."""


class WorkerProcess:
    """One worker, with the processes that it starts a group of its own.

    Between two questions it waits on a pipe, computing nothing. It ends when its parent does, in whatever way; of the
    others of its group those that are left are killed when it is closed.
    """

    def __init__(self, command: Sequence[str], timeout: float, environment: dict[str, str] | None = None) -> None:
        self._timeout = timeout
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the worker
        self._buffer = b""
        self._is_busy = False
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=os.environ | (environment or {}),
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        except OSError as error:
            self._stderr.close()
            raise WorkerError(f"{command[0]} cannot be run: {error.strerror}", unavailable=True) from None

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ask(self, op: str, **message: Any) -> dict[str, Any]:
        """Its answer; WorkerError where there is none, or where it is a refusal."""
        assert self._process.stdin is not None
        self._is_busy = True
        with contextlib.suppress(BrokenPipeError):  # it died: the missing answer says so
            self._process.stdin.write(json.dumps({"op": op, **message}).encode() + b"\n")
            self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read_line(op))
        self._is_busy = False
        if "unavailable" in answer:
            raise WorkerError(answer["unavailable"], unavailable=True)
        if "error" in answer:
            text = str(answer["error"]) + self._root_cause(str(answer["error"]))
            no_memory = bool(answer.get("no_memory")) or "out of memory" in text.lower()
            raise WorkerError(text, no_memory=no_memory)
        return answer

    def close(self) -> None:
        """Tell it to end, and see to it; one that has not answered yet is not waited for."""
        if self._is_busy:
            self._kill()
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(b'{"op": "quit"}\n')
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._stderr.close()

    def _kill(self) -> None:
        """It and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read_line(self, op: str) -> bytes:
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + self._timeout
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._kill()
                raise WorkerError(f"{op} took longer than {self._timeout:g} s{self._tail()}")
            piece = os.read(descriptor, 1 << 20)
            if not piece:
                raise WorkerError(self._how_it_died(op))
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _how_it_died(self, op: str) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"the process ended with exit code {code} in {op}{self._tail()}"
        name = signal.Signals(-code).name
        why = ", which is how a system ends a process when memory runs out" if name == "SIGKILL" else ""
        return f"the process was killed by {name} in {op}{why}{self._tail()}"

    def _tail(self) -> str:
        """The last lines it wrote."""
        lines = self._written(10_000)[-STDERR_LINES:]
        return f"; it wrote: {' | '.join(line.strip() for line in lines)}" if lines else ""

    def _root_cause(self, text: str) -> str:
        """What a process of its own wrote of the exception that ended it, where `text` only says that it wrote it."""
        if "root cause" not in text:
            return ""
        told = [found[1] for line in self._written(100_000) if (found := OF_ITS_PROCESS.search(line))]
        return f"; the root cause: {told[-1]}" if told else self._tail()

    def _written(self, most: int) -> list[str]:
        """The lines of the last `most` bytes that it wrote."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - most))
        return self._stderr.read().decode("utf-8", "replace").strip().splitlines()
