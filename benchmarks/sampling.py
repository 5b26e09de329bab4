"""Sampling on a GPU: checked against an exact reference first, then timed inside CUDA graphs.

The reference sorts in float64. Weights are rounded otherwise on a device, so that a draw near the border of two tokens
may fall to either, and so may the last token of top-p: where tokens differ, the draw must lie that near. The tokens of
a row must be the same among 1, 8, 128 and 256 rows, and cut up among any number of programs.

Times are microseconds a call: the median over replays of a graph of ten calls, on as many different logits as fit into
1 GiB, so that those of many rows come from memory.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --rows 1 --sizes 151936 --programs 1,8,32,75,128
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product

import torch
from torch import Tensor

from tessera.attention.timing import FLUSH_BYTES, capture_runs, event_ms
from tessera.kernels.sampling import sample

CALLS = 10
REPEATS = 20
COPIES_BYTES = 2**30
TIMED = {
    "greedy": (0.0, 0, 1, 0),
    "temperature": (0.6, 0, 1, 0),
    "top_p": (1.0, 0, 0.9, 0),
    "top_k+top_p": (1.0, 50, 0.9, 0),
    "min_p": (1.0, 0, 1, 0.05),
}
"""Of every row: temperature, top_k, top_p, min_p."""
CHECKED = [
    *TIMED.values(), (1.7, 7, 1, 0), (1.0, 1, 1, 0), (1.0, 10_000, 1, 0), (1.0, 10**9, 1, 0), (3.0, 0, 0.999, 0),
    (1.0, 0, 0.05, 0), (1.5, 0, 0.8, 0.01), (2.0, 400, 0.5, 0.001), (0.8, 5000, 0.95, 0), (1e-6, 0, 0.9, 0),
    (50.0, 0, 0.5, 0),
]  # fmt: skip
NEAR = 5e-5
"""The share of a row's weight by which the sums of two ways of rounding may lie apart."""
EQUAL = 4e-6
"""By how much two weights may differ, relative to them, that another way of rounding makes equal."""


def make_logits(rows: int, size: int, spread: float) -> Tensor:
    """[rows, size] float32, normal with that deviation."""
    return torch.randn(rows, size, device="cuda") * spread


def make_table(kinds: list[tuple[float, ...]]) -> Tensor:
    """[kinds, 5] float64 with draws of their own."""
    draws = torch.randint(0, 2**32, (len(kinds), 1), device="cuda").double() / 2**32
    return torch.cat([torch.tensor(kinds, dtype=torch.float64, device="cuda"), draws], 1)


def shares_around(logits: Tensor, row: Tensor, token: int, equal: float, slack: float) -> tuple[float, float]:
    """The shares of weight before a token and up to it, in float64; both 0 where the token is not kept.

    equal  how much less than the least kept weight is kept too
    slack  by how much more than it is told top-p keeps
    """
    temperature, top_k, top_p, min_p, _ = row.tolist()
    weights = ((logits.double() - logits.max().double()) / temperature).exp()
    kept = weights >= min_p * (1 - equal)
    if 0 < top_k < len(logits):
        kept &= weights >= weights.topk(int(top_k)).values[-1] * (1 - equal)
    if top_p < 1:
        ordered = torch.where(kept, weights, 0.0).sort(descending=True).values
        before = ordered.cumsum(0) - ordered
        kept &= weights >= ordered[before < min(1, top_p + slack) * ordered.sum()].min() * (1 - equal)
    through = torch.where(kept, weights, 0.0).cumsum(0) / weights[kept].sum()
    before_token = through[token - 1] if token else torch.zeros(())
    return (float(before_token), float(through[token])) if bool(kept[token]) else (0.0, 0.0)


def is_right(logits: Tensor, row: Tensor, token: int) -> bool:
    """Whether a row's draw falls to this token, or as near to it as rounding explains."""
    if float(row[0]) == 0:
        return token == int(logits.argmax())
    draw = float(row[4])
    for equal, slack in product((0.0, EQUAL), (0.0, NEAR, -NEAR)):
        before, through = shares_around(logits, row, token, equal, slack)
        if before < through and before - NEAR <= draw <= through + NEAR:
            return True
    return False


def check(size: int, programs: list[int]) -> None:
    """Tokens of every kind of parameters, alone and among others; SystemExit where one is wrong."""
    for spread in (0.0, 0.1, 1.0, 3.0, 10.0):
        logits = make_logits(256, size, spread)
        table = make_table([CHECKED[row % len(CHECKED)] for row in range(256)])
        found = sample(logits, table)
        for row in range(4 * len(CHECKED)):
            if not is_right(logits[row], table[row], int(found[row])):
                raise SystemExit(f"{size} logits, spread {spread}, {table[row].tolist()}: token {int(found[row])}")
        for rows in (1, 8, 128):
            for first in range(0, min(256, 16 * rows), rows):
                part = slice(first, first + rows)
                if not torch.equal(sample(logits[part], table[part]), found[part]):
                    raise SystemExit(f"{size} logits, spread {spread}: {rows} rows from {first} on have other tokens")
        for count in programs:
            if not torch.equal(sample(logits, table, programs_per_row=count), found):
                raise SystemExit(f"{size} logits, spread {spread}: {count} programs a row have other tokens")
        if not torch.equal(sample(logits, table, room=3), found):
            raise SystemExit(f"{size} logits, spread {spread}: without room for a list there are other tokens")
    print(f"checked: {size} logits")


def time_us(rows: int, size: int, kind: tuple[float, ...], spread: float, programs: int | None) -> float:
    """Microseconds that a call takes on the device."""
    copies = max(1, min(CALLS, COPIES_BYTES // (4 * rows * size)))
    logits = [make_logits(rows, size, spread) for _ in range(copies)]
    table = make_table([kind] * rows)
    kept: list[Tensor] = []
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    graph = capture_runs(
        lambda number: kept.append(sample(logits[number % copies], table, programs_per_row=programs)), CALLS
    )
    return 1000 * statistics.median(event_ms(graph.replay, flush) for _ in range(REPEATS)) / CALLS


@torch.inference_mode()
def main() -> None:
    """Check, then print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,32,128,256")
    parser.add_argument("--sizes", default="49152,151936", help="of vocabularies")
    parser.add_argument("--spreads", default="3", help="standard deviations of logits; 0.1 is nearly even")
    parser.add_argument("--programs", default="", help="programs a row to time as well, whatever is chosen")
    parser.add_argument("--no-check", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU, and these kernels are for one")
    torch.manual_seed(0)
    sizes, rows = ([int(x) for x in text.split(",")] for text in (options.sizes, options.rows))
    forced = [int(x) for x in options.programs.split(",") if x]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for size in sizes if not options.no_check else []:
        check(size, forced or [1, 3, 32])
    print("\n| vocab | spread | rows | programs | " + " | ".join(TIMED) + " |\n" + "| --- " * (4 + len(TIMED)) + "|")
    for size in sizes:
        for spread in (float(x) for x in options.spreads.split(",")):
            for count in rows:
                for programs in (None, *forced):
                    times = [time_us(count, size, kind, spread, programs) for kind in TIMED.values()]
                    cells = " | ".join(f"{each:.1f}" for each in times)
                    print(f"| {size} | {spread:g} | {count} | {programs or 'chosen'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
