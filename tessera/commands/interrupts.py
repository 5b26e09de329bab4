"""What Ctrl-C does: while a command starts it ends the process at once, afterwards it is an exception as usual.

An exception in the middle of an import is lost, or turned into another one, by whichever library is being imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

EXIT_CODE = 130
"""What a shell has for a process that an interrupt ended."""


def end_on_interrupt() -> None:
    """From here on Ctrl-C ends the process, without a word; where it was to be ignored it is still."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """From here on Ctrl-C is KeyboardInterrupt: for what has more to do then than to end."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(_number: int, _frame: FrameType | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or in the middle of a write
            stream.flush()
    os._exit(EXIT_CODE)
