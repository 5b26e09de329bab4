"""Work on many tensors at once: whole tensors side by side, not each one cut into pieces.

Loading is thousands of short operations. Split among threads, each ends when the slowest thread has had its
turn, which on a busy machine takes milliseconds; whole tensors wait for nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


def for_each(function: Callable[[Item], None], items: Iterable[Item]) -> Iterator[None]:
    """Call `function` on every item, in as many threads as torch computes with; yields as each is done, in order.

    While it runs, torch uses one thread an operation in the whole process. The first error ends it.
    """
    num_workers = torch.get_num_threads()
    with _one_thread_an_operation(), ThreadPoolExecutor(num_workers, "load") as pool:
        yield from pool.map(function, items)


@contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
