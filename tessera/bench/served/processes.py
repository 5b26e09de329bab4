"""A load divided among processes, so that the client is not what is measured.

Each process has an event loop of its own and a share of the calls; all have made their connections and sent a request
before the clock starts, which is one for all: `time.perf_counter()` counts from one moment in every process of a system
(CLOCK_MONOTONIC on Linux), and each is asked for its time to see that it does. What comes back is one load, whose
figures mean what they mean of a single process.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from tessera.bench.served.client import LEAD_SECONDS, Client
from tessera.bench.served.client_process import Job, read_message, write_message
from tessera.bench.served.load import Call, Dialect, Load
from tessera.bench.served.loop import run
from tessera.bench.served.parent import end_with_parent
from tessera.errors import ConfigError, TesseraError

STREAMS_PER_PROCESS = 32
"""Where nobody says: a step of an engine sends a token to each stream at once, and so many are read in half a
millisecond."""
CORES_PER_PROCESS = 4
"""Where nobody says: the others are the server's."""
MAX_PROCESSES = 64
STOP_SECONDS = 10.0

MessageT = TypeVar("MessageT")


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_processes(asked: int, num_calls: int, what: str) -> None:
    """ConfigError for more processes than cores, which would wait for one another, or than there are `what`."""
    if asked > (cores := num_cores()):
        raise ConfigError(
            f"--client-processes {asked} is more than the {cores} cores here, and none would be on time",
            f"use {cores} at most, or leave it out",
        )
    if asked > num_calls:
        raise ConfigError(
            f"--client-processes {asked} is more than the {num_calls} {what}, and some would have nothing to send",
            f"use {num_calls} at most, or leave it out",
        )


def num_processes(asked: int, calls: Sequence[Call], concurrency: int | None) -> int:
    """How many processes send `calls`: `asked`, but no more than there are streams; 0: by streams and cores.

    Streams are the calls in flight of a closed loop; of an open one, where the server decides how many those are, the
    calls due within a second.
    """
    streams = concurrency or _most_within_a_second(calls)
    wanted = asked or min(-(-streams // STREAMS_PER_PROCESS), num_cores() // CORES_PER_PROCESS, MAX_PROCESSES)
    return max(1, min(wanted, concurrency or len(calls), len(calls)))


def measure(job: Job, processes: int, dialect: Dialect | None = None) -> Load:
    """Send a load from so many processes, from this one alone where it is one; TesseraError where one fails.

    `dialect` is what the server is known to understand, and what it refused afterwards.
    """
    dialect = dialect or Dialect()
    if processes == 1:
        client = Client(job.url, job.model, timeout_s=job.timeout_s, headers=job.headers, dialect=dialect)
        is_open = job.concurrency is None
        return run(client.open_loop(job.calls) if is_open else client.closed_loop(job.calls, job.concurrency or 1))
    shares = _dealt(job, processes)
    jobs = [replace(share, usage_per_chunk=dialect.usage_per_chunk) for share in shares]
    with _children(len(jobs)) as children:
        loads = _loads(children, jobs)
    dialect.usage_per_chunk = all(understood for _, understood in loads)
    return _merged(job, shares, [load for load, _ in loads])


def _loads(children: Sequence[_Child], jobs: Sequence[Job]) -> list[tuple[Load, bool]]:
    """What each measured, with whether the server took its requests as they were; all start at one moment."""
    for child, job in zip(children, jobs, strict=True):
        child.send(job)
    for child in children:
        child.check_clock(child.receive(float))
    started = time.perf_counter() + LEAD_SECONDS
    for child in children:
        child.send(started)
    for child in children:
        child.receive(bool)  # over: only when all are may any look into what it holds, which takes time
    for child in children:
        child.send(True)
    return [child.receive(tuple[Load, bool]) for child in children]


def _dealt(job: Job, processes: int) -> list[Job]:
    """Open: by turns in order of time. Closed: each has its share of the places and of the calls for them."""
    if job.concurrency is None:
        calls = sorted(job.calls, key=lambda call: call.at_s)
        return [replace(job, calls=calls[i::processes]) for i in range(processes)]
    places = min(job.concurrency, len(job.calls))
    return [
        replace(
            job,
            calls=[call for k, call in enumerate(job.calls) if k % places % processes == i],
            concurrency=len(range(i, places, processes)),
        )
        for i in range(processes)
    ]


def _merged(job: Job, shares: Sequence[Job], loads: Sequence[Load]) -> Load:
    """One load of all; replies in the order of the job's calls."""
    replies = {
        id(call): reply
        for share, load in zip(shares, loads, strict=True)
        for call, reply in zip(share.calls, load.replies, strict=True)
    }
    return Load(
        [replies[id(call)] for call in job.calls],
        seconds=max(load.seconds for load in loads),
        client_cpu=max(load.client_cpu for load in loads),
        lag_s=max(load.lag_s for load in loads),
        wake_s=[late for load in loads for late in load.wake_s],
        client_cpu_total=sum(load.client_cpu_total for load in loads),
        num_processes=len(loads),
    )


def _most_within_a_second(calls: Sequence[Call]) -> int:
    times = sorted(call.at_s for call in calls)
    return max((bisect_left(times, at + 1.0) - i for i, at in enumerate(times)), default=1)


class _Child:
    """A process that sends its share when it is told to."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tessera.bench.served.client_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )

    def send(self, message: Any) -> None:
        """Tell it something."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it died: the missing answer says so
            write_message(self._process.stdin, message)

    def receive(self, kind: type[MessageT]) -> MessageT:
        """The next message; TesseraError where it ended before."""
        assert self._process.stdout
        try:
            return msgspec.msgpack.decode(read_message(self._process.stdout), type=kind)
        except EOFError:
            code = self._process.wait()
            raise TesseraError(
                f"a process of the client ended with exit code {code}", "see what it wrote, or use --client-processes 1"
            ) from None

    def check_clock(self, told: float) -> None:
        """TesseraError where its clock is not ours."""
        now = time.perf_counter()
        if not self._began <= told <= now:
            raise TesseraError(
                f"a process of the client has another clock: {told:.3f} s, between {self._began:.3f} and {now:.3f}",
                "use --client-processes 1 on this system",
            )

    def kill(self) -> None:
        """What it does is of no use any more."""
        self._process.kill()

    def close(self) -> None:
        """See to it that it has ended."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def _children(number: int) -> Iterator[list[_Child]]:
    children: list[_Child] = []
    try:
        children.extend(_Child() for _ in range(number))
        yield children
    except BaseException:
        for child in children:
            child.kill()
        raise
    finally:
        for child in children:
            child.close()
