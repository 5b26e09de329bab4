"""Where the rows of a step stood in the step before."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import numpy as np
from numpy.typing import NDArray


def rows_among(things: Iterable[object], others: Iterable[object]) -> NDArray[np.int64]:
    """[things] int64: where each stands in `others`, -1 where it does not."""
    rows = {other: row for row, other in enumerate(others)}
    return np.fromiter(map(rows.get, things, repeat(-1)), np.int64)
