"""Compiling our own kernels while the libraries of others are imported, before all of them are timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from threading import Thread

import torch

from tessera.attention.contract import Phase, Shape, import_error
from tessera.attention.registry import load_backend
from tessera.attention.selftest import self_test_problem


@contextmanager
def compiling_early(phases: Sequence[Phase], shapes: Sequence[Shape]) -> Iterator[None]:
    """While this lasts triton's kernels for these phases are compiled in a thread, on a GPU; it ends when they are.

    Most of compiling is not Python's, and importing libraries for a GPU takes as long as compiling does.
    """
    if not phases or shapes[0].device_type != "cuda":
        yield
        return
    # Imported by one thread: what another finds half imported would look broken to it.
    import_error("triton")
    device = torch.cuda.current_device()  # each thread has its own
    thread = Thread(target=_set_up, args=(phases, shapes, device), name="compiling")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _set_up(phases: Sequence[Phase], shapes: Sequence[Shape], device: int) -> None:
    """Bind triton to each and run it; whatever goes wrong, those who do so in earnest will say."""
    torch.cuda.set_device(device)
    for phase, shape in product(phases, shapes):
        try:
            self_test_problem(load_backend("triton")(phase, shape))
        except Exception:
            return
