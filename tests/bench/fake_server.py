"""A server of known delays that notes what it really did, for tests of what measures it; a process of its own.

The first part of the path is how it behaves: `/steady/v1/completions`. `GET /record` tells, for each answer, when the
request had come and when each token left, by `time.perf_counter()`, which on Linux all processes share.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

TTFT_S = 0.050
ITL_S = 0.010
SLOW_TTFT_S = 1.0
JITTER = 0.2
QUICK_MODES = ("quick", "words", "remembers", "short", "miscounts", "refuses")
"""Behaviours whose delays nobody measures: a tenth of the others'. `quick` is `steady` otherwise."""
REFUSED_SEED = 666
"""A request with this seed is answered 500."""


@dataclass
class Answer:
    """What the server did for one request."""

    seed: int
    mode: str
    body: dict[str, Any]
    came: float
    tokens: list[float] = field(default_factory=list)
    ended: float = 0.0


RECORD: list[Answer] = []


class Fake:
    """The server, as the tests see it."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"

    def url(self, mode: str) -> str:
        return f"{self.root}/{mode}/v1"

    def record(self, mode: str) -> list[Answer]:
        """Answers in this mode since it was last asked, by seed; in mode `refused`, what `refuses` refused."""
        with urllib.request.urlopen(f"{self.root}/record?{mode}") as response:
            return sorted((Answer(**each) for each in json.load(response)), key=lambda each: each.seed)

    def forget(self) -> None:
        """Of all modes."""
        with urllib.request.urlopen(f"{self.root}/forget"):
            pass


@contextlib.contextmanager
def running_fake() -> Iterator[Fake]:
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield Fake(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Writer:
    """One HTTP response."""

    def __init__(self, stream: asyncio.StreamWriter) -> None:
        self.stream = stream

    def plain(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        self.stream.write(head.encode() + data)

    def begin(self) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        self.stream.write(head)

    def event(self, event: Any) -> None:
        data = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
        self.stream.write(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self) -> None:
        self.stream.write(b"0\r\n\r\n")


async def serve(reader: asyncio.StreamReader, stream: asyncio.StreamWriter) -> None:
    stream.transport.get_extra_info("socket").setsockopt(6, 1, 1)  # TCP_NODELAY
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            came = time.perf_counter()
            method, path, _ = head.decode().split(" ", 2)
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"), 0
            )
            body = json.loads(await reader.readexactly(length)) if length else {}
            if key := next((line[15:] for line in head.split(b"\r\n") if line.startswith(b"Authorization: ")), b""):
                body["key"] = key.decode()
            await answer(method, path, body, came, Writer(stream))
            await stream.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        stream.close()


async def answer(method: str, path: str, body: dict[str, Any], came: float, out: Writer) -> None:
    if path.startswith("/record?"):
        mode = path.partition("?")[2]
        out.plain(200, [asdict(each) for each in RECORD if each.mode == mode])
        RECORD[:] = [each for each in RECORD if each.mode != mode]
        return
    if path == "/forget":
        RECORD.clear()
        out.plain(200, {})
        return
    mode, _, route = path[1:].partition("/")
    if route == "v1/models":
        out.plain(200, {"data": [{"id": "fake"}]})
    elif method == "GET" or mode == "http500" or body.get("seed") == REFUSED_SEED:
        out.plain(404 if method == "GET" else 500, {"error": {"message": "as the test wishes"}})
    elif mode == "refuses" and "continuous_usage_stats" in body["stream_options"]:
        RECORD.append(Answer(body.get("seed", 0), "refused", body, came))
        out.plain(400, {"error": {"message": "unknown field stream_options.continuous_usage_stats"}})
    elif mode == "plain":
        out.plain(200, {"choices": [{"text": "hello"}]})
    else:
        mine = Answer(body.get("seed", 0), mode, body, came)
        RECORD.append(mine)
        await Text(mode, body, mine, out, chat=route.endswith("chat/completions")).write()
        mine.ended = time.perf_counter()


class Text:
    """One streamed answer."""

    def __init__(self, mode: str, body: dict[str, Any], mine: Answer, out: Writer, *, chat: bool) -> None:
        self.mode, self.body, self.mine, self.out, self.chat = mode, body, mine, out, chat
        self.random = random.Random(mine.seed)
        self.num_sent = 0
        self.total = body["max_tokens"] - (mode == "short")

    def usage(self) -> dict[str, Any]:
        prompt = self.body.get("prompt") or "a message"
        return {
            "prompt_tokens": len(prompt) + (self.mode == "miscounts"),
            "completion_tokens": self.num_sent,
            "prompt_tokens_details": {"cached_tokens": 1},
        }

    def chunk(self, text: str, finish: str | None = None, role: str | None = None) -> dict[str, Any]:
        delta = {"content": text} | ({"role": role} if role else {})
        choice = {"index": 0, "finish_reason": finish} | ({"delta": delta} if self.chat else {"text": text})
        tells = self.body["stream_options"].get("continuous_usage_stats") and not self.mode.startswith("ignores")
        usage = {"usage": self.usage()} if tells and self.mode != "nousage" else {}
        return {"choices": [choice], **usage}

    async def sleep(self, seconds: float) -> None:
        jitter = self.random.uniform(1 - JITTER, 1 + JITTER)
        await asyncio.sleep(seconds * jitter / (10 if self.mode in QUICK_MODES else 1))

    async def write(self) -> None:
        out, per_chunk = self.out, int(self.mode[-1]) if self.mode[-1].isdigit() else 1
        out.begin()
        if self.chat:
            out.event(self.chunk("", role="assistant"))
        await self.sleep(SLOW_TTFT_S if self.mode == "slow" else TTFT_S)
        while self.num_sent < self.total:
            if self.num_sent:
                await self.sleep(per_chunk * ITL_S)
            more = min(per_chunk, self.total - self.num_sent)
            self.num_sent += more
            self.mine.tokens += [time.perf_counter()] * more
            out.event(self.chunk("" if self.mode == "silent" else "word " * more))
            await out.stream.drain()
            if self.num_sent >= 3 and await self.goes_wrong():
                return
        out.event(self.chunk("", finish="abort" if self.mode == "abort" else "length"))
        if self.mode != "nousage":
            out.event({"choices": [], "usage": self.usage()})
        if self.mode != "nodone":
            out.event(b"[DONE]")
        out.end()

    async def goes_wrong(self) -> bool:
        if self.mode == "drop":
            self.out.stream.transport.abort()
        elif self.mode == "ends":
            self.out.end()
        elif self.mode == "error":
            self.out.event({"error": {"message": "out of memory"}})
            self.out.event(b"[DONE]")
            self.out.end()
        elif self.mode == "notjson":
            self.out.event(b"{oh")
        elif self.mode == "stall":
            await asyncio.sleep(30)
        else:
            return False
        return True


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
