"""Ctrl-C while a command starts ends it at once: 130, and not a word."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import partial

import pytest

GENERATE = ("generate", "--prompt", "hi", "--max-tokens", "300", "--ignore-eos", "--dtype", "float32")
READY = """
import sys
import tessera.__main__ as process
end_on_interrupt = process.end_on_interrupt
process.end_on_interrupt = lambda: (end_on_interrupt(), print("ready", flush=True))
sys.exit(process.main())
"""
"""The command's process, which says when it has begun."""


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0])
def test_an_interrupt_during_a_start_ends_it(seconds: float) -> None:
    """As imports are under way, which lose exceptions or make others of them."""
    process = subprocess.Popen(
        [sys.executable, "-c", READY, *GENERATE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # which a shell's & has ignored
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors and "terminate" not in errors
    assert time.monotonic() - sent < 10


def said_by(code: str) -> str:
    """What a process of this code writes."""
    code = f"import os, signal\nfrom tessera.commands.interrupts import *\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True).stdout


def test_commands_that_have_something_to_end_are_told() -> None:
    code = (
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "end_on_interrupt()\n"
        "raise_on_interrupt()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    signal.pause()\n"
        "except KeyboardInterrupt:\n    print('raised')\n"
    )
    assert said_by(code) == "raised\n"


def test_where_interrupts_are_ignored_they_stay_so() -> None:
    """As a shell has it for what runs in the background."""
    code = (
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "end_on_interrupt()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('here')\n"
    )
    assert said_by(code) == "here\n"
