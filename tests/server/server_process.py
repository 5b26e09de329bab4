"""Servers as real processes, talked to over real HTTP."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import psutil

SERVE = (sys.executable, "-m", "tessera.cli", "serve")
SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_server.py")))
START_SECONDS = 60


class ServerProcess:
    """A server on a free port, and what it wrote to stderr."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [*command, "--port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}),
        )
        self.lines: list[str] = []
        self._news: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self._wait_for_url()
        self.http = httpx2.Client(base_url=self.url, timeout=60)

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)
            self._news.put(line)

    def _wait_for_url(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                line = self._news.get(timeout=0.2)
            except queue.Empty:
                assert self.process.poll() is None, "".join(self.lines)
                continue
            if found := re.search(r"URL +(http://\S+)/v1", line):
                return found[1]
        raise AssertionError("no URL in " + "".join(self.lines))

    @property
    def engine(self) -> psutil.Process:
        """The engine process."""
        return next(p for p in psutil.Process(self.process.pid).children() if "tessera" in " ".join(p.cmdline()))

    def post(self, path: str, body: Any) -> httpx2.Response:
        return self.http.post(path, json=body)

    def status(self) -> dict[str, int]:
        """The engine's counters."""
        counters: dict[str, int] = self.http.get("/v1/status").json()["status"]
        return counters

    def wait_until_idle(self, seconds: float = 10) -> dict[str, int]:
        """The counters, once nothing runs; the engine reports at least twice a second."""
        wait_for(lambda: (status := self.status())["running"] == status["waiting"] == 0, seconds)
        return self.status()

    def stop(self) -> int:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def wait_for(claim: Callable[[], Any], seconds: float = 10) -> Any:
    """The first true value of `claim`, asked until `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while not (value := claim()):
        assert time.monotonic() < deadline, f"still {value!r} after {seconds} s"
        time.sleep(0.05)
    return value


def check_error(response: httpx2.Response, status: int, *, param: str | None = None, words: str = "") -> dict[str, Any]:
    """Assert that a response is an error in OpenAI's shape."""
    assert response.status_code == status, response.text[:500]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"] and words in error["message"], error
    if param is not None:
        assert error["param"] == param, error
    return error
