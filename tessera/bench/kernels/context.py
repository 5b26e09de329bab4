"""The device of a run, which one bad kernel can take from all: who broke it, and what can be said of it."""

from __future__ import annotations

import gc
from contextlib import suppress

import torch

from tessera.errors import TesseraError


class Context:
    """Of a process on a device; `lost` says who ended it and how, and is empty as long as it lives.

    A kernel that reads where it must not ends a CUDA context: from then on every call of every backend raises.
    """

    def __init__(self, device_type: str) -> None:
        self._on_cuda = device_type == "cuda"
        self.lost = ""

    def probe(self, who: str, failure: str) -> None:
        """After a failure of `who`: give its memory back, and see whether the device still answers; never raises."""
        self.tidy()
        if not self._on_cuda or self.lost:
            return
        try:
            torch.cuda.synchronize()
        except Exception:
            self.lost = f"not measured: {who} broke the device for this process: {failure}"

    def tidy(self) -> None:
        """Give all memory back that nothing holds any more; libraries take it past torch's allocator too."""
        if self._on_cuda and not self.lost:
            gc.collect()
            with suppress(Exception):
                torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    """What went wrong; its kind too, where it is not ours."""
    if isinstance(error, TesseraError):
        return error.message
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
