"""What fusing attention's neighbours is worth: each kernel against torch's operators and against torch.compile.

For the widths of three models and a few numbers of tokens: microseconds a call on the device, as a CUDA graph of
several calls on different memory behind a write that empties the cache; microseconds that one call keeps the host
busy without a graph; the time in which the memory could move each number once; and how far the results lie apart.
Sampling is compared with a sort of the vocabulary, by operators that a graph can record.

    python benchmarks/neighbours.py --json neighbours.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from neighbour_cases import MODELS, MOST_SAMPLED_ROWS, Case, Function, layer_cases, sampling_cases
from torch import Tensor

from tessera.attention.timing import COPIES_BYTES, FLUSH_BYTES, MAX_COPIES, capture_runs, event_ms, wall_ms

BYTES_PER_SECOND = 4.46e12
"""What an H200 was measured to read."""
HOST_CALLS = 50


@dataclass(frozen=True)
class Row:
    """What was measured; times in microseconds, None where it was not."""

    name: str
    model: str
    tokens: int
    torch_us: float
    compiled_us: float | None
    fused_us: float
    bound_us: float
    torch_host_us: float
    fused_host_us: float
    differing: float
    """Share of the results that are not the same number."""
    apart: float
    """Largest difference, in units of the last place of the larger of the number and 1."""


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[float, float]:
    """The share of numbers that differ, and by how many last places; token ids by share alone."""
    numbers = sum(x.numel() for x in found)
    share = sum(int((x != y).sum()) for x, y in zip(found, expected, strict=True)) / numbers
    apart = [
        float(((x.float() - y.float()).abs() / y.float().abs().clamp(min=1)).max() / torch.finfo(x.dtype).eps)
        for x, y in zip(found, expected, strict=True)
        if x.is_floating_point()
    ]
    return share, max(apart, default=0.0)


def check(case: Case) -> tuple[float, float]:
    """How the two results differ; SystemExit where it is more than rounding explains."""
    arguments = case.make()
    copies = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
    share, apart = difference(case.fused(*copies), case.by_torch(*arguments))
    # Of 256 rows that share out 2^32 draws, a few fall between the sums of two ways of adding.
    if apart > 4 or (not apart and share > 0.05):
        raise SystemExit(
            f"{case.name} of {case.model}, {case.tokens} tokens: {share:.2%} differ, by {apart:.1f} places"
        )
    return share, apart


def device_us(call: Function, copies: list[tuple[Any, ...]], flush: Tensor, repeats: int) -> float:
    """The median time of a call in a graph that has one for each copy of the arguments."""
    graph = capture_runs(lambda number: call(*copies[number % len(copies)]), len(copies))
    times = [event_ms(graph.replay, flush) for _ in range(repeats)]
    return 1000 * statistics.median(times) / len(copies)


def host_us(call: Function, arguments: tuple[Any, ...]) -> float:
    """The least time that the host is busy with a call."""
    times = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize()
        times.append(wall_ms(lambda: call(*arguments)))
    return 1000 * min(times)


def measure(case: Case, repeats: int, *, compiled: bool) -> Row:
    """Check a case, then time it each way."""
    share, apart = check(case)
    count = max(2, min(MAX_COPIES["cuda"], COPIES_BYTES["cuda"] // case.num_bytes))
    copies = [case.make() for _ in range(count)]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    compiled_us = None
    if compiled and case.compiles:
        torch.compiler.reset()  # or the limit of recompilations would quietly end in operators
        compiled_us = device_us(torch.compile(case.by_torch, dynamic=False), copies, flush, repeats)
    return Row(
        name=case.name,
        model=case.model,
        tokens=case.tokens,
        torch_us=device_us(case.by_torch, copies, flush, repeats),
        compiled_us=compiled_us,
        fused_us=device_us(case.fused, copies, flush, repeats),
        bound_us=1e6 * case.num_bytes / BYTES_PER_SECOND,
        torch_host_us=host_us(case.by_torch, copies[0]),
        fused_host_us=host_us(case.fused, copies[0]),
        differing=share,
        apart=apart,
    )


def line(row: Row) -> str:
    """A row of the Markdown table."""
    compiled = "-" if row.compiled_us is None else f"{row.compiled_us:.1f}"
    over_compiled = "-" if row.compiled_us is None else f"{row.compiled_us / row.fused_us:.2f}"
    return (
        f"| {row.name} | {row.model} | {row.tokens} | {row.torch_us:.1f} | {compiled} | {row.fused_us:.1f} | "
        f"{row.torch_us / row.fused_us:.2f} | {over_compiled} | {row.bound_us:.2f} | "
        f"{row.bound_us / row.fused_us:.0%} | {row.torch_host_us:.0f} | {row.fused_host_us:.0f} | "
        f"{row.differing:.3%} | {row.apart:.1f} |"
    )


HEADER = (
    "| kernel | model | tokens | torch us | compiled us | fused us | torch / fused | compiled / fused | bound us | "
    "of the bound | torch host us | fused host us | differing | last places |\n" + "| --- " * 14 + "|"
)


@torch.inference_mode()
def main() -> None:
    """Print a Markdown table; with --json also append each row to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default="1,32,256,4096")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU, and these kernels are for one")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16\n\n{HEADER}")
    for model in options.models.split(","):
        for tokens in (int(number) for number in options.tokens.split(",")):
            cases = [*layer_cases(model, tokens)]
            cases += sampling_cases(model, tokens) if tokens <= MOST_SAMPLED_ROWS else []
            for case in cases:
                row = measure(case, options.repeats, compiled=not options.no_compile)
                print(line(row))
                sys.stdout.flush()
                if options.json:
                    with options.json.open("a") as file:
                        file.write(json.dumps(asdict(row)) + "\n")


if __name__ == "__main__":
    main()
