"""Servers to be measured: our own, started for it, or any that speaks OpenAI's API."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar
from urllib.error import HTTPError

import msgspec
import psutil

from tessera.bench.record import Subject
from tessera.bench.served.answers import NO_ANSWER, get, plain_cause
from tessera.bench.served.load import Dialect
from tessera.bench.served.memory import gpu_bytes, peak_bytes
from tessera.bench.served.parent import end_with_parent
from tessera.bench.subjects import Wanted, subject_of
from tessera.config import EngineConfig, section_types, settings_of
from tessera.errors import ConfigError, TesseraError
from tessera.types import AttentionChoice, EngineInfo, EngineStatus

START_SECONDS = 600.0
"""A model may be large, and its backends are measured and proven at start."""
STOP_SECONDS = 20.0
NUM_LAST_LINES = 12
_DECIDED = ("attention", "prefill_attention", "decode_attention", "prove_attention")

AnswerT = TypeVar("AnswerT")


class _Status(msgspec.Struct):
    engine: EngineInfo
    status: EngineStatus


class _Attention(msgspec.Struct):
    phases: dict[str, AttentionChoice]


class _Card(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Card]


class Server:
    """A server that answers at `url`, which ends in /v1; a context manager that stops what it started."""

    def __init__(self, url: str, api_key: str | None = None, dialect: Dialect | None = None) -> None:
        self.url = url.rstrip("/")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.dialect = dialect or Dialect()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End what was started for this server; nothing, where nothing was."""

    @property
    def model(self) -> str:
        """The first model it serves; TesseraError where it does not say."""
        models = self._ask("/models", _Models).data
        if not models:
            raise TesseraError(f"{self.url}/models names no model", "serve one")
        return models[0].id

    @property
    def info(self) -> EngineInfo | None:
        """What the engine is; None where the server is not ours."""
        found = self._ask_if_there("/status", _Status)
        return found.engine if found else None

    def attention(self) -> list[AttentionChoice]:
        """What serves each phase, with its proofs; [] where the server is not ours."""
        found = self._ask_if_there("/attention", _Attention)
        return list(found.phases.values()) if found else []

    def status(self) -> EngineStatus | None:
        """The engine's counters; None where the server is not ours."""
        found = self._ask_if_there("/status", _Status)
        return found.status if found else None

    def peak_memory_bytes(self) -> int | None:
        """The most memory it has held; None where that cannot be seen from here."""
        return None

    def gpu_memory_bytes(self) -> int | None:
        """What its processes hold of the GPUs; None where that cannot be seen from here."""
        return None

    def memory(self) -> dict[str, float]:
        """`peak_memory_bytes` of the host and `gpu_memory_bytes`, where they can be seen from here."""
        held = {"peak_memory_bytes": self.peak_memory_bytes(), "gpu_memory_bytes": self.gpu_memory_bytes()}
        return {name: float(size) for name, size in held.items() if size is not None}

    def _ask(self, path: str, kind: type[AnswerT]) -> AnswerT:
        try:
            return msgspec.json.decode(get(self.url + path, self.headers), type=kind)
        except NO_ANSWER as error:
            raise TesseraError(
                f"{self.url}{path} did not answer as it should: {plain_cause(error)}", self._hint(path, error)
            ) from None

    def _hint(self, path: str, error: BaseException) -> str:
        """What to look at; where the same path answers with a /v1 more or less in the address, that address."""
        if isinstance(error, HTTPError) and error.code in (401, 403):
            return "its key is read from TESSERA_API_KEY"
        root = self.url
        while root.endswith("/v1"):
            root = root.removesuffix("/v1").rstrip("/")
        for other in (f"{root}/v1", root):
            with contextlib.suppress(*NO_ANSWER):
                if other != self.url and b'"id"' in get(other + path, self.headers):
                    return f"use {other}"
        return "is the server up, and does its address end in /v1, once?"

    def _ask_if_there(self, path: str, kind: type[AnswerT]) -> AnswerT | None:
        """As `_ask`; None where the server does not know the path or means something else by it."""
        try:
            return msgspec.json.decode(get(self.url + path, self.headers), type=kind)
        except (HTTPError, ValueError):
            return None
        except NO_ANSWER as error:
            said = f"{self.url} does not answer any more: {plain_cause(error)}"
            raise TesseraError(said, "see its own log") from None


class ExternalServer(Server):
    """A server that somebody else started; TesseraError at once where it does not answer."""

    def __init__(self, url: str, api_key: str | None = None, dialect: Dialect | None = None) -> None:
        super().__init__(url, api_key, dialect)
        _ = self.model

    def subject(self, label: str) -> Subject:
        """Of unknown make, unless it is one of ours that has proofs."""
        choices = self.attention()
        proofs = [proof for choice in choices for proof in choice.proofs]
        if not choices:
            return Subject(label, engine="server", note="not proven: a server that was not started for this")
        resolved = {choice.phase: choice.backends for choice in choices}
        if not proofs:
            return Subject(label, engine="server", resolved=resolved, note="not proven: it was started without proofs")
        return Subject(label, resolved=resolved, proofs=proofs)


class ServerProcess(Server):
    """`tessera serve` in a process of its own, on a free port, with these flags, proofs on; stop it, or use `with`.

    TesseraError, with what it said itself, where it does not serve within `start_seconds`.
    """

    def __init__(
        self, flags: Sequence[str], environment: Mapping[str, str] | None = None, start_seconds: float = START_SECONDS
    ) -> None:
        command = [sys.executable, "-m", "tessera.cli", "serve", "--port", "0", "--prove-attention", *flags]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | dict(environment or {}),
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        self.lines: deque[str] = deque(maxlen=1000)
        self._news: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name="server's log", daemon=True)
        self._reader.start()
        try:
            key = dict(environment or {}).get("TESSERA_API_KEY", os.environ.get("TESSERA_API_KEY"))
            super().__init__(self._wait_for_url(start_seconds), key)
            get(self.url.removesuffix("/v1") + "/health", {})
        except BaseException:
            self.stop()
            raise

    def subject(self, wanted: Wanted) -> Subject:
        """What it runs, proven by itself."""
        info = self.info
        if info is None:
            raise TesseraError(f"the server at {self.url} does not say what it is", "see its log")
        return subject_of(wanted, info)

    def peak_memory_bytes(self) -> int | None:
        """Peaks of the resident memory of its processes, added; from their start on, loading included.

        Pages that two of them share are counted twice. Where the system keeps no peaks, what they hold now.
        """
        return sum(peak_bytes(process) for process in self._processes())

    def gpu_memory_bytes(self) -> int | None:
        """As nvidia-smi has it; None without one, and in a container that hides its processes from it."""
        return gpu_bytes({process.pid for process in self._processes()})

    def stop(self) -> None:
        """Tell it to end and wait; kill what does not."""
        children = self._processes()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in children:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._reader.join(1.0)

    def _processes(self) -> list[psutil.Process]:
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.Error:
            return []

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)
            self._news.put(line)

    def _hint(self, path: str, error: BaseException) -> str:
        """What became of it, where it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # its connections break a moment before it has ended
            code = self.process.wait(0.5)
            return f"the server that was started for this has ended, with exit code {code}"
        return super()._hint(path, error)

    def _wait_for_url(self, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                line = self._news.get(timeout=0.2)
            except queue.Empty:
                if self.process.poll() is None:
                    continue
                self._reader.join(1.0)
                raise self._did_not_start(f"ended with exit code {self.process.returncode}") from None
            if found := re.search(r"URL +(http://\S+/v1)", line):
                return found[1]
        raise self._did_not_start(f"did not serve within {seconds:g} s")

    def _did_not_start(self, how: str) -> TesseraError:
        """With the server's own sentence where it said one, else its last lines."""
        text = "".join(self.lines)
        own = re.search(r"^(?:tessera: )?error: (.*?)(?:\n\s*hint: (.*))?\Z", text.strip(), re.DOTALL | re.MULTILINE)
        if own:
            return TesseraError(f"the server {how}: {' '.join(own[1].split())}", own[2])
        last = " | ".join(line.strip() for line in list(self.lines)[-NUM_LAST_LINES:])
        return TesseraError(f"the server {how}; its last lines: {last or 'none'}", "start it by hand: tessera serve")


def serve_flags(config: EngineConfig) -> list[str]:
    """The flags of `tessera serve` for this engine, without those for attention, which the benchmark decides.

    ConfigError where `config` names a backend or forbids proofs.
    """
    flags: list[str] = []
    for name, section in section_types(EngineConfig).items():
        for setting in settings_of(section):
            value: Any = getattr(getattr(config, name), setting.name)
            if value == setting.default:
                continue
            if setting.name in _DECIDED:
                hint = f"leave {setting.flag} out and name backends with --backends"
                raise ConfigError(f"{setting.flag} {value} is decided by the benchmark", hint)
            if setting.kind is bool:
                flags.append(setting.flag if value else f"--no-{setting.flag[2:]}")
            else:
                flags.append(f"{setting.flag}={value}")
    return flags
