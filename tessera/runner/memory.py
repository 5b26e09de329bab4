"""Memory: what the weights need, what is left, and how many pages fit into it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil
import torch

from tessera.errors import CapacityError

_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Where version 2 and version 1 keep a container's limit, its use, and how much of that is droppable file cache."""


def free_memory_bytes(device: torch.device) -> int:
    """Bytes a program could still take: on CUDA of the device, else of RAM, within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    for folder, limit_name, used_name, cache_name in _CGROUPS:
        limit, used = _read_bytes(folder / limit_name), _read_bytes(folder / used_name)
        if limit is not None and used is not None:
            free = min(free, limit - used + _read_stat(folder / "memory.stat", cache_name))
    return max(0, free)


def keep_freed_memory() -> bool:
    """Have this process keep memory it frees, up to 2 GiB, instead of giving it back; returns whether it will.

    A step frees and asks again for the same large tensors many times. By default glibc gives such memory back
    at once, and the system then has to clear every page of it anew: 20,000 page faults a step of 512 tokens
    (docs/LOG.md). Other C libraries are left as they are.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    kept = mallopt(ctypes.c_int(trim_threshold), ctypes.c_int(2**31 - 1))
    larger = any(mallopt(ctypes.c_int(mmap_threshold), ctypes.c_int(size)) for size in (2**30, 2**25))
    return bool(kept) and larger


def check_weights_fit(num_weight_bytes: int, device: torch.device, share: float) -> None:
    """Raise CapacityError, with both numbers, where the weights are larger than what may be taken."""
    free = free_memory_bytes(device)
    usable = int(free * share)
    if num_weight_bytes > usable:
        where = "GPU memory" if device.type == "cuda" else "RAM"
        raise CapacityError(
            f"the weights need {gib(num_weight_bytes)}, {gib(usable)} of {where} may be used ({gib(free)} free)",
            "use a smaller model, --dtype bfloat16, or free some memory",
        )


def check_pages_fit(num_bytes: int, num_pages: int, device: torch.device) -> None:
    """Raise CapacityError, with both numbers, where a cache asked for by its pages is larger than what is free."""
    free = free_memory_bytes(device)
    if num_bytes > free:
        raise CapacityError(f"{num_pages} pages need {gib(num_bytes)}, {gib(free)} are free", "use fewer --num-pages")


def num_pages_that_fit(usable_bytes: int, page_bytes: int, max_useful: int, max_model_len: int, page_size: int) -> int:
    """Pages for `usable_bytes`, at most `max_useful`.

    Raises CapacityError where not even one sequence of `max_model_len` fits, saying which length would.
    """
    num_pages = min(usable_bytes // page_bytes, max_useful) if usable_bytes > 0 else 0
    if num_pages * page_size < max_model_len:
        needed = -(-max_model_len // page_size) * page_bytes
        hint = f"use --max-model-len {num_pages * page_size}" if num_pages else "use a smaller model"
        raise CapacityError(
            f"one sequence of {max_model_len} tokens needs {gib(needed)} of cache, {gib(max(0, usable_bytes))} is left",
            f"{hint}, or give the cache more with --gpu-memory-utilization or --cpu-memory-utilization",
        )
    return num_pages


def gib(num_bytes: int) -> str:
    """Bytes as a person reads them."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 // 10 else f"{num_bytes / 2**20:.1f} MiB"


def _read_bytes(path: Path) -> int | None:
    """The number in a cgroup file; None where there is no such file or no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _read_stat(path: Path, name: str) -> int:
    """One counter of a cgroup's memory.stat; 0 where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(value) for key, _, value in (line.partition(" ") for line in lines) if key == name), 0)
