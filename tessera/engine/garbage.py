"""Python's garbage collector, kept out of the loop of steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keep_what_is_there() -> Iterator[None]:
    """Within it no collection looks at what is there now: modules, libraries and weights, which takes 100 ms.

    What is made within is collected as ever.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
