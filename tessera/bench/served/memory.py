"""What processes hold of the host's memory and of the GPUs', as the system tells it."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Set
from pathlib import Path

import psutil


def peak_bytes(process: psutil.Process) -> int:
    """The most resident memory that a process has held, or holds where no peaks are kept; 0 of one that ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        return int(found[1]) * 1024 if found else int(process.memory_info().rss)
    except OSError:
        with contextlib.suppress(psutil.Error):
            return int(process.memory_info().rss)
    return 0


def gpu_bytes(pids: Set[int]) -> int | None:
    """What processes hold of the GPUs, by nvidia-smi; None without one, or where it does not know them."""
    ask = ("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(",") for line in told.splitlines() if line.count(",") == 1]
    held = [int(memory) * 2**20 for pid, memory in rows if pid.strip().isdigit() and int(pid) in pids]
    return sum(held) if held else None
