"""One process of several that send a load together: asked over its standard input, answering on its standard output.

It is told its share, makes ready and says what time it is; is told when the clock starts, and says when its share is
over; is told that all are, and answers with what it measured. A message is its length in 8 bytes and msgpack.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgspec

from tessera.bench.served.client import Client, Gate
from tessera.bench.served.load import Call, Dialect
from tessera.bench.served.loop import run

_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Job:
    """A load, or a share of one, and where it goes."""

    url: str
    """Ends in /v1."""
    model: str
    calls: list[Call]
    timeout_s: float
    concurrency: int | None = None
    """Calls in flight of a closed loop; None: the loop is open."""
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    usage_per_chunk: bool = True
    """As `Dialect` has it."""


class _Gate(Gate):
    """Opened and closed by the parent, for all processes at once."""

    def __init__(self, asked: BinaryIO, told: BinaryIO) -> None:
        super().__init__(0.0)
        self._asked, self._told = asked, told

    def start(self) -> float:
        write_message(self._told, time.perf_counter())
        return msgspec.msgpack.decode(read_message(self._asked), type=float)

    def over(self) -> None:
        write_message(self._told, True)
        read_message(self._asked)


def write_message(pipe: BinaryIO | Any, message: Any) -> None:
    """One message; BrokenPipeError where nobody reads."""
    data = msgspec.msgpack.encode(message)
    pipe.write(len(data).to_bytes(_LENGTH_BYTES) + data)
    pipe.flush()


def read_message(pipe: BinaryIO | Any) -> bytes:
    """The next message as it came; EOFError where there is none."""
    length = pipe.read(_LENGTH_BYTES)
    data: bytes = pipe.read(int.from_bytes(length)) if len(length) == _LENGTH_BYTES else b""
    if len(length) < _LENGTH_BYTES or len(data) < int.from_bytes(length):
        raise EOFError
    return data


def main() -> None:
    """Send one share."""
    asked, told = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints is no message
    job = msgspec.msgpack.decode(read_message(asked), type=Job)
    dialect, gate = Dialect(job.usage_per_chunk), _Gate(asked, told)
    client = Client(job.url, job.model, timeout_s=job.timeout_s, headers=job.headers, dialect=dialect)
    if job.concurrency is None:
        load = run(client.open_loop(job.calls, gate))
    else:
        load = run(client.closed_loop(job.calls, job.concurrency, gate))
    write_message(told, (load, dialect.usage_per_chunk))


if __name__ == "__main__":
    try:
        main()
    except EOFError:  # the parent has gone, or wants nothing more
        sys.exit(1)
