"""CUDA events and graphs behind typed functions, for torch does not annotate what makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def make_event(*, timing: bool = False) -> torch.cuda.Event:
    """An event that is not recorded yet, with a time if it is to be measured by."""
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]
    return event


def graph_pool() -> Any:
    """Memory for graphs to share, see `capture`."""
    return torch.cuda.graph_pool_handle()


def capture(
    call: Callable[[], Result], warm_up: Callable[[], object], pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """`call` as a graph, with what it returned: tensors that every replay writes anew.

    `warm_up` runs before on a stream of its own: whatever compiles or chooses on its first call must do so there.
    Graphs of one `pool` (see `graph_pool`) share the memory of what none of them returned.
    """
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            warm_up()
    finally:  # or what a run that failed has begun would read what is written next
        torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = call()
    return graph, result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory was full: torch's own, or a driver's or library's, for which there is but a text.

    Be it that ending a capture then failed for another reason.
    """
    while True:
        text = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "alloc_failed" in text:
            return True
        before = error.__cause__ or error.__context__
        if before is None:
            return False
        error = before
