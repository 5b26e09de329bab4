"""How long requests and tokens take, counted as they come: what `/metrics` shows beside the engine's own counters."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from tessera.types import FinishReason

TOKEN_BOUNDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
"""Seconds between tokens, from a GPU's graph to a laptop's large model."""
REQUEST_BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
"""Seconds to a first token, or to the end of a request."""


class Histogram:
    """Counts of seconds up to each of `bounds` and above the last, and their sum.

    Written to for every token, so it is three operations: a library's costs four times as much (docs/LOG.md).
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count `seconds` as seen `count` times."""
        self.counts[bisect_left(self.bounds, seconds)] += count
        self.total += seconds * count


class Latency:
    """How long the engine took, from when a request goes to it, by its own clock; written on one event loop.

    What the API process takes to send tokens comes on top: it may be a few steps behind, and then sends them together.
    """

    def __init__(self) -> None:
        self.first_token = Histogram(REQUEST_BOUNDS)
        """To each sequence's first tokens."""
        self.inter_token = Histogram(TOKEN_BOUNDS)
        """Between the tokens of a sequence after its first, those of one step (drafts) an equal share each."""
        self.sequence = Histogram(REQUEST_BOUNDS)
        """To the end of each sequence that ended by itself."""
        self.finished: Counter[FinishReason] = Counter()
        """Sequences by how their texts ended; `abort`: left by the client, refused or given up by the engine."""
        self.responses: Counter[tuple[str, int]] = Counter()
        """HTTP responses begun, by path and status."""
