"""Processes that must not outlive the benchmark that started them."""

from __future__ import annotations

import ctypes
import signal
import sys

_C = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """In the new process: get SIGTERM when the thread that made it ends, in whatever way: to be the main thread.

    A no-op where the system is not Linux.
    """
    if _C is not None:
        _C.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
