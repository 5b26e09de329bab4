"""Compiling our own kernels while the libraries of others are imported, before all of them are timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from threading import Thread

from tessera.attention.contract import Phase, Shape
from tessera.attention.registry import load_backend
from tessera.attention.selftest import self_test_problem


@contextmanager
def compiling_early(phases: Sequence[Phase], shapes: Sequence[Shape]) -> Iterator[None]:
    """While this lasts triton's kernels for these phases are compiled in a thread, on a GPU; it ends when they are.

    Most of compiling is not Python's, and importing libraries for a GPU takes as long as compiling does.
    """
    if shapes[0].device_type != "cuda":
        yield
        return
    thread = Thread(target=_set_up, args=(phases, shapes), name="compiling")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _set_up(phases: Sequence[Phase], shapes: Sequence[Shape]) -> None:
    """Bind triton to each and run it; whatever goes wrong, those who do so in earnest will say."""
    for phase, shape in product(phases, shapes):
        try:
            self_test_problem(load_backend("triton")(phase, shape))
        except Exception:
            return
