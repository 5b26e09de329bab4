"""An event loop that is on time, and what tells how far it was not."""

from __future__ import annotations

import asyncio
import atexit
import gc
import select
import selectors
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

WATCH_SECONDS = 0.005
"""Between two looks at how late the loop is."""
_MAX_SELECT_FD = 1024

ResultT = TypeVar("ResultT")


def run(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """As `asyncio.run`, on a loop that is woken to the tenth of a millisecond."""
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        return runner.run(work)


async def sleep_until(at: float) -> None:
    """Until `at` by `time.perf_counter()`; returns at once where that is over."""
    if (left := at - time.perf_counter()) > 0:
        await asyncio.sleep(left)


async def watch(started: float, late: list[float]) -> None:
    """Add to `late`, until cancelled, how many seconds after every WATCH_SECONDS since `started` the loop came to it.

    A loop that is held up for long misses several in a row, and each counts: as often as it was late when something
    could have arrived.
    """
    due = started
    while True:
        await sleep_until(due)
        now = time.perf_counter()
        while due <= now:
            late.append(now - due)
            due += WATCH_SECONDS


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection: with torch loaded, one takes longer than many a gap between tokens."""
    was = gc.isenabled()
    _set_aside()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@cache
def _set_aside() -> None:
    """What is there before the first load, modules above all, is not looked at by later collections."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or the end of the process would find it unowned


def _new_loop() -> asyncio.AbstractEventLoop:
    if sys.platform != "linux":
        return asyncio.new_event_loop()
    return asyncio.SelectorEventLoop(_Punctual())


if sys.platform == "linux":

    class _Punctual(selectors.EpollSelector):
        """epoll waits whole milliseconds, rounded up; select, here on epoll's own descriptor, microseconds."""

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            """As the base class."""
            if timeout is not None and timeout > 0 and self.fileno() < _MAX_SELECT_FD:
                select.select([self.fileno()], [], [], timeout)
                timeout = 0
            return super().select(timeout)
