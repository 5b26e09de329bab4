"""What a streamed token costs the API process, and the client that measures it: processor time, without a model.

Serves a scripted engine that gives every running sequence a token each `--step-ms`, loads it with so many streams at
once by the client of `tessera bench`, and prints tokens a second and microseconds of processor time a token of the API
process and of the client. Processor time, so that a busy machine changes little.

    python benchmarks/streams.py --streams 256 --tokens 200 --step-ms 1
    python benchmarks/streams.py --streams 64 --tokens 200 --step-ms 20
    python benchmarks/streams.py --streams 256 --tokens 200 --requests 1024 --step-ms 4

With more requests than streams the next one is sent as one ends, their lengths differ by up to a half, and the times to
the first token are of those that are sent while others run.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from urllib.request import urlopen

import psutil

from tessera.types import AttentionChoice, EngineInfo, EngineStatus, Output, Request

STEP_SECONDS = "STREAMS_STEP_SECONDS"
"""The environment variable that tells the engine process."""


class ScriptedEngine:
    """A token a step for every sequence, until each has as many as were asked for."""

    def __init__(self) -> None:
        choice = AttentionChoice("decode", "none", "scripted")
        self.info = EngineInfo(
            "scripted", "none", "float32", "cpu", 49152, 8192, [2], 16, 100_000, 1024, 8192, [choice]
        )
        self._left: dict[tuple[str, int], int] = {}
        self._seconds = float(os.environ[STEP_SECONDS])

    @property
    def has_work(self) -> bool:
        """Whether any sequence is running."""
        return bool(self._left)

    def add(self, request: Request) -> None:
        """Run a request's sequences."""
        for index in range(request.params.n):
            self._left[request.request_id, index] = request.params.max_tokens or 1

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request, or one sequence of it."""
        for key in [key for key in self._left if key[0] == request_id and index in (None, key[1])]:
            del self._left[key]

    def step(self) -> list[Output]:
        """Wait, then a token each."""
        time.sleep(self._seconds)
        outputs = []
        for key, left in list(self._left.items()):
            outputs.append(Output(*key, [500 + left % 3000], finish_reason="length" if left == 1 else None))
            self._left[key] = left - 1
            if left == 1:
                del self._left[key]
        return outputs

    def status(self) -> EngineStatus:
        """Counters, of which only the running ones are true."""
        return EngineStatus(running=len(self._left), pages_total=100_000, pages_free=100_000)


def serve(port: int) -> int:
    """`tessera serve` with this file as its engine process."""
    from tessera.config import EngineConfig, ServerConfig
    from tessera.server.run import run_server

    config, server = EngineConfig(), ServerConfig(port=port)
    program = (sys.executable, os.path.abspath(__file__), "--engine")
    return run_server(config, server, lambda *_: None, log_level="error", program=program)


def be_engine(address: str) -> None:
    """The engine process, which the server starts with an address to talk to."""
    from tessera.server import engine_process

    engine_process.build = lambda _: ScriptedEngine()  # type: ignore[assignment]
    sys.argv = [sys.argv[0], address]
    engine_process.main()


def load(port: int, streams: int, requests: int, tokens: int, processes: int) -> dict[str, float]:
    """Tokens a second, what they cost, and when the first one came, of so many streams at once."""
    from tessera.bench.served.client_process import Job
    from tessera.bench.served.load import Call
    from tessera.bench.served.processes import measure

    api = next(
        each.pid for each in psutil.net_connections("tcp") if each.laddr.port == port and each.status == "LISTEN"
    )
    source = random.Random(0)
    lengths = [
        tokens if requests <= streams else source.randint(max(1, tokens // 2), tokens * 3 // 2) for _ in range(requests)
    ]
    calls = [Call(i, [5, 6, 7 + i], length, fields={"ignore_eos": True}) for i, length in enumerate(lengths)]
    job = Job(f"http://127.0.0.1:{port}/v1", "scripted", calls, timeout_s=120, concurrency=streams)
    measure(job, processes)  # everybody's first time
    process = psutil.Process(api)
    before = process.cpu_times()
    found = measure(job, processes)
    after = process.cpu_times()
    assert not found.failed, found.failed[0].error
    spent = after.user + after.system - before.user - before.system
    beside_others = [reply for reply in found.replies if reply.index >= streams] or found.replies
    first = sorted(1e3 * (reply.token_s[0] - reply.sent_s) for reply in beside_others)
    return {
        "tokens a second": sum(lengths) / found.seconds,
        "API process, us a token": 1e6 * spent / sum(lengths),
        "client, us a token": 1e6 * found.client_cpu_total * found.seconds / sum(lengths),
        "first token, ms, median": first[len(first) // 2],
        "first token, ms, nine of ten": first[len(first) * 9 // 10],
    }


def wait_for(port: int, seconds: float = 60.0) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urlopen(f"http://127.0.0.1:{port}/health").close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def at_least(least: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    """A number from `least` on."""

    def number(text: str) -> float:
        try:
            found = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        if not found >= least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {text}")
        return found

    return number


def main() -> None:
    """Serve, load, and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=at_least(1, int), default=256)
    parser.add_argument("--tokens", type=at_least(1, int), default=200, help="of each stream")
    parser.add_argument(
        "--requests", type=at_least(1, int), help="one after the other in each stream; left out: one in each"
    )
    parser.add_argument("--step-ms", type=at_least(0, float), default=1.0, help="time between the tokens of a stream")
    parser.add_argument("--client-processes", type=at_least(1, int), default=1)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--serve", action="store_true", help="only serve")
    parser.add_argument("--engine", metavar="ADDRESS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        be_engine(options.engine)
    requests = options.streams if options.requests is None else options.requests
    if requests < options.streams:
        parser.error(f"--requests {requests} are fewer than --streams {options.streams}")
    os.environ[STEP_SECONDS] = str(options.step_ms / 1000)
    if options.serve:
        sys.exit(serve(options.port))
    words = [sys.executable, __file__, "--serve", "--port", str(options.port), "--step-ms", str(options.step_ms)]
    server = subprocess.Popen(words)
    try:
        wait_for(options.port)
        found = load(options.port, options.streams, requests, options.tokens, options.client_processes)
    finally:
        server.terminate()
        server.wait()
    what = (
        f"{requests} requests of about {options.tokens} tokens"
        if requests > options.streams
        else f"{options.tokens} tokens"
    )
    print(f"{options.streams} streams, {what}, a step each {options.step_ms:g} ms\n")
    print("| what | |\n| --- | --- |")
    for name, value in found.items():
        print(f"| {name} | {value:,.1f} |")


if __name__ == "__main__":
    main()
