"""Comparisons in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tessera.bench.statistics import Comparison


def spread(found: Comparison) -> str:
    """`95% interval 1.31 to 1.39, 5 repeats`."""
    if math.isinf(found.high):
        return repeats(found)
    return f"95% interval {found.low:.2f} to {found.high:.2f}, {repeats(found)}"


def in_words(found: Comparison) -> str:
    """`1.35x faster (95% interval ...)`, `unchanged (0.98 to 1.02, 5 repeats)`, `not told apart (0.20 to 4.50, ...)`.

    Unchanged is only what was shown to be: the whole interval lies within 5% of 1.
    """
    if found.verdict == "no difference":
        word = "unchanged" if found.is_level else "not told apart"
        return f"{word} ({found.low:.2f} to {found.high:.2f}, {repeats(found)})"
    factor = found.ratio if found.ratio >= 1 else 1 / found.ratio
    word = "faster" if found.ratio >= 1 else "slower"
    if found.verdict == "too few repeats":
        return f"{factor:.2f}x {word} in {repeats(found)}, too few to tell from noise"
    return f"{factor:.2f}x {word} ({spread(found if found.ratio >= 1 else found.inverse)})"


def within_run(found: Comparison) -> str:
    """Of timings of one run."""
    if found.verdict == "too few repeats":
        return f"{found.ratio:.2f}x as fast, with too few timings to tell from noise"
    if found.verdict == "no difference":
        return (
            f"{'level' if found.is_level else 'not told apart'} (within one run: {found.low:.2f} to {found.high:.2f})"
        )
    return f"{found.ratio:.2f}x as fast (95% interval within one run {found.low:.2f} to {found.high:.2f})"


def repeats(found: Comparison) -> str:
    """`5 repeats`; of kernels, `1 run`."""
    return f"{found.num_repeats} repeat{'' if found.num_repeats == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
