"""SIGTERM, as `kill` and `timeout` send it, ends a benchmark as Ctrl-C does: with all that it started and made."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """Of this process alone, where Ctrl-C goes to its children too."""


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """As long as it lasts; only in the main thread, for no other hears of signals.

    Without it SIGTERM ends Python on the spot: folders for a while stay for ever, and children go on alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(_: int, __: FrameType | None) -> None:
    raise Terminated
