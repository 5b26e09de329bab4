"""What a case must compute and move, counted from its lengths alone, whatever a backend does beyond it."""

from __future__ import annotations

from dataclasses import dataclass

from tessera.bench.kernels.cases import Heads


@dataclass(frozen=True)
class Cost:
    """Of one layer's attention."""

    flops: float
    """4 x head size x query heads x visible pairs: a product and a sum for q·k, and for the weighted sum of v."""
    num_bytes: float
    """Queries, and those keys and values that a query sees, read once; the answer written once."""

    def __add__(self, other: Cost) -> Cost:
        """Of both."""
        return Cost(self.flops + other.flops, self.num_bytes + other.num_bytes)

    def least_ms(self, ceiling_flops: float, ceiling_bytes: float) -> float:
        """Milliseconds on a machine with these ceilings per second, computing and moving at the same time."""
        return 1000 * max(self.flops / ceiling_flops, self.num_bytes / ceiling_bytes)

    def bound(self, ceiling_flops: float, ceiling_bytes: float) -> str:
        """Which of the two ceilings is met first: `compute` or `bandwidth`."""
        return "compute" if self.flops / ceiling_flops > self.num_bytes / ceiling_bytes else "bandwidth"


def visible_pairs(q_len: int, kv_len: int, *, causal: bool, window: int | None) -> int:
    """How many (query, key) pairs of a sequence attend.

    Query i of q_len stands at p = kv_len - q_len + i. Causal: it sees min(p + 1, window) keys. Not causal: all
    within the window on both sides.
    """
    reach = kv_len if window is None else min(window, kv_len)
    first = kv_len - q_len + 1  # keys that the first query sees without a window
    growing = max(0, reach - first + 1)  # queries that see no more than `reach`
    pairs = growing * (first + first + growing - 1) // 2 + (q_len - growing) * reach
    if causal:
        return pairs
    # Seeing ahead: query at p has kv_len - 1 - p keys after it, of which reach - 1 are near enough.
    ahead = min(q_len, reach)
    return pairs + ahead * (ahead - 1) // 2 + (q_len - ahead) * (reach - 1)


def seen_keys(q_len: int, kv_len: int, *, window: int | None) -> int:
    """How many keys of a sequence at least one of its new tokens sees."""
    return kv_len if window is None else min(kv_len, window + q_len - 1)


def cost(
    lens: tuple[tuple[int, int], ...], heads: Heads, itemsize: int, *, causal: bool, window: int | None = None
) -> Cost:
    """The cost of sequences of these (q_len, kv_len); `itemsize` is the bytes of a number."""
    pairs = sum(visible_pairs(q_len, kv_len, causal=causal, window=window) for q_len, kv_len in lens)
    tokens = sum(q_len for q_len, _ in lens)
    keys = sum(seen_keys(q_len, kv_len, window=window) for q_len, kv_len in lens)
    numbers = 2 * heads.dim * (tokens * heads.query + keys * heads.kv)
    return Cost(4.0 * heads.dim * heads.query * pairs, float(numbers * itemsize))
