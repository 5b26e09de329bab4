"""What a linear layer of few rows in one launch is worth, with and without what rides along, beside cuBLAS.

For the products of three models' layers, and for all four of a layer in a row, with 1 to 16 rows: microseconds a call
in a CUDA graph that reads so many different weights that no cache holds them. `cuBLAS` is torch's linear alone,
`torch` with RMSNorm, sum or SwiGLU as launches of their own, `alone` and `fused` the same by `small_linear`, `product`
with the norm as a launch of its own before it, by our kernel; each of these with and without programmatic dependent
launch. Each result is first held against float64, within what the roundings on its way can explain.

    python benchmarks/small_linear.py --json small_linear.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tessera.attention.timing import FLUSH_BYTES, capture_runs, event_ms
from tessera.kernels.dependent import pdl_on
from tessera.kernels.norm import rms_norm
from tessera.kernels.small_linear import Norm, small_linear
from tessera.kernels.small_linear_tiles import FEW_ROWS

EPS = 1e-6
COPIES_BYTES = 2**28
"""Weights that are read in turn: five times the second-level cache of an H200."""
MAX_COPIES = 256
DEVIATIONS = 6
"""Standard deviations of an error that is the sum of many roundings: of a million results none is further off."""
WAYS = ("cublas", "torch", "alone", "alone_pdl", "product", "product_pdl", "fused", "fused_pdl")


class Product(NamedTuple):
    """One linear layer and what stands around it."""

    name: str
    outputs: int
    """Rows of the weight."""
    inputs: int
    norm: bool = False
    gated: bool = False

    @property
    def num_bytes(self) -> int:
        """Of the weight in bfloat16."""
        return 2 * self.outputs * self.inputs


MODELS = {
    "SmolLM2-135M": (576, 960, 576, 1536),
    "Qwen3-0.6B": (1024, 4096, 2048, 3072),
    "Llama-3-8B": (4096, 6144, 4096, 14336),
}
"""Hidden size, rows of q, k and v, numbers of all query heads, size of the MLP."""


def products_of(model: str) -> list[Product]:
    """The four of a layer, in order."""
    hidden, qkv, heads, size = MODELS[model]
    return [
        Product("norm + qkv", qkv, hidden, norm=True),
        Product("output + sum", hidden, heads),
        Product("norm + gate_up + SwiGLU", 2 * size, hidden, norm=True, gated=True),
        Product("down + sum", hidden, size),
    ]


class Arguments(NamedTuple):
    """Of one call."""

    x: Tensor
    weight: Tensor
    norm: Norm | None
    residual: Tensor | None
    gated: bool


@dataclass(frozen=True)
class Row:
    """What was measured: microseconds a call by each of `WAYS`, None where a way is not to be had."""

    model: str
    name: str
    outputs: int | None
    inputs: int | None
    rows: int
    num_bytes: int
    us: dict[str, float | None]
    apart: float
    """Largest difference between `fused` and float64, in places of bfloat16 of the number or the common size of one."""


def make(one: Product, rows: int, count: int) -> list[Arguments]:
    """Arguments of equal numbers, each with memory of its own."""
    device, dtype = "cuda", torch.bfloat16
    x = torch.randn(rows, one.inputs, dtype=dtype, device=device)
    weight = torch.randn(one.outputs, one.inputs, dtype=dtype, device=device) / one.inputs**0.5
    norm = Norm(torch.rand(one.inputs, dtype=dtype, device=device) + 0.5, EPS) if one.norm else None
    residual = None if one.norm else torch.randn(rows, one.outputs, dtype=dtype, device=device)
    return [Arguments(x, weight.clone(), norm, residual, one.gated) for _ in range(count)]


def by_torch(given: Arguments, *, alone: bool = False) -> Tensor:
    """Each operator a launch, or two; `alone` the product and nothing else."""
    x, weight, norm, residual, gated = given
    if alone:
        return functional.linear(x, weight)
    if norm is not None:
        x = functional.rms_norm(x, x.shape[1:], norm.weight, norm.eps)
    out = functional.linear(x, weight)
    if gated:
        gate, up = out.chunk(2, 1)
        out = functional.silu(gate) * up
    return out if residual is None else out + residual


def by_kernel(given: Arguments, kind: str, *, pdl: bool = False) -> Tensor:
    """The same in one launch, or in two where the kind is `product` and there is a norm; `alone` as `by_torch`."""
    x, weight, norm, residual, gated = given
    if kind == "alone":
        return small_linear(x, weight, pdl=pdl)
    if kind == "product" and norm is not None:
        x, norm = rms_norm(x, norm.weight, norm.eps, pdl=pdl), None
    return small_linear(x, weight, norm=norm, residual=residual, gated=gated, pdl=pdl)


def way(name: str) -> Callable[[Arguments], Tensor]:
    """One of `WAYS` as a function."""
    if name in ("cublas", "torch"):
        return lambda given: by_torch(given, alone=name == "cublas")
    kind = name.removesuffix("_pdl")
    return lambda given: by_kernel(given, kind, pdl=name != kind)


def ways_here() -> list[str]:
    """Those of `WAYS` that this GPU has."""
    return [name for name in WAYS if not name.endswith("pdl") or pdl_on(torch.device("cuda", 0))]


def check(given: Arguments) -> float:
    """How far `fused` lies from float64, in places; SystemExit where a way is further off than roundings explain."""
    exact = Arguments(*(_double(value) for value in given))
    apart = 0.0
    for name in ways_here()[2:]:
        kind = name.removesuffix("_pdl")
        found, reference = way(name)(given), by_torch(exact, alone=kind == "alone")
        error = (found.double() - reference).abs()
        share = float((error / allowed(exact, kind, reference)).max())
        if not share <= 1:
            shapes = f"{tuple(given.x.shape)} x {tuple(given.weight.shape)}"
            raise SystemExit(f"{name}, {shapes}: {share:.2f} times as far off as its roundings explain")
        apart = float((error / reference.abs().clamp(min=float(reference.std()))).max())
    return apart / torch.finfo(torch.bfloat16).eps


def allowed(exact: Arguments, kind: str, reference: Tensor) -> Tensor:
    """How far a result may be off, for each number; arguments and reference in float64.

    Every result is rounded once at its end, by up to half a place. Before that, a product of K numbers is off by

    - the K roundings of float32 as it is added up, each of up to a place of a partial sum, as tensor cores cut off;
    - where bfloat16 holds normed values, or values times the norm's weight for tensor cores, the rounding of each: up
      to half a place, 1 / sqrt(3) of that in the root mean square, by chance up or down, so that they add up as
      squares: the deviation is that times sqrt(sum((value * weight)^2)), which is what a product of these is in size.

    Both come to `DEVIATIONS` of their standard deviations at most. SwiGLU multiplies what comes of two such products:
    each error by what the other is worth, and the two errors with each other. So where gate is near 0 and up large, an
    error of a few places of gate is many of the result, for which no fixed number of places is right.
    """
    x, weight, norm, _, gated = exact
    if norm is not None and kind != "alone":
        x = functional.rms_norm(x, x.shape[1:], norm.weight, norm.eps)
        rounded = kind == "product" or x.shape[0] > FEW_ROWS
    else:
        rounded = False
    half_place = torch.finfo(torch.bfloat16).eps / 2
    size = (x.square() @ weight.square().t()).sqrt()
    added_up = torch.finfo(torch.float32).eps * x.shape[1] ** 0.5
    error = DEVIATIONS * size * (added_up + rounded * half_place / 3**0.5)
    if gated and kind != "alone":
        gate, up = functional.linear(x, weight).chunk(2, 1)
        of_gate, of_up = error.chunk(2, 1)
        opened = gate.sigmoid()
        slope = opened * (1 + gate * (1 - opened))
        error = (slope * up * of_gate).abs() + (gate * opened * of_up).abs() + of_gate * of_up
    allowed_error: Tensor = 1.01 * half_place * reference.abs() + error
    return allowed_error


def _double(value: Any) -> Any:
    if isinstance(value, Norm):
        return Norm(value.weight.double(), value.eps)
    return value.double() if isinstance(value, Tensor) else value


def time_us(call: Callable[[Arguments], object], copies: list[list[Arguments]], flush: Tensor, repeats: int) -> float:
    """The median time of the calls of one copy, in a graph of all copies."""

    def run(number: int) -> None:
        for given in copies[number % len(copies)]:
            call(given)

    graph = capture_runs(run, len(copies))
    return 1000 * statistics.median(event_ms(graph.replay, flush) for _ in range(repeats)) / len(copies)


def measure(model: str, name: str, products: list[Product], rows: int, flush: Tensor, repeats: int) -> Row:
    """Check the products, then time them in a row, each way."""
    num_bytes = sum(one.num_bytes for one in products)
    count = max(2, min(MAX_COPIES, COPIES_BYTES // num_bytes))
    copies = [list(each) for each in zip(*(make(one, rows, count) for one in products))]
    apart = max(check(given) for given in copies[0])
    here = ways_here()
    us = {each: time_us(way(each), copies, flush, repeats) if each in here else None for each in WAYS}
    only = products[0] if len(products) == 1 else None
    return Row(model, name, only and only.outputs, only and only.inputs, rows, num_bytes, us, apart)


def warm_up(case: tuple[str, int]) -> None:
    """Have the kernels of a model's layer compiled and kept on disk."""
    model, rows = case
    for one in products_of(model):
        (given,) = make(one, rows, 1)
        for name in ways_here()[2:]:
            way(name)(given)
    torch.cuda.synchronize()


HEADER = (
    "| model | product | weight | rows | MB | cuBLAS us | torch us | alone us | alone, PDL us | product us | "
    "product, PDL us | fused us | fused, PDL us | TB/s | cuBLAS / alone | torch / best | places |\n"
    + "| --- " * 17
    + "|"
)


def line(row: Row) -> str:
    """A row of the Markdown table; speed and ratios are of the fastest: of two ways alone, of four with all."""
    times = [row.us[name] for name in WAYS]
    alone, best = (min(us for us in some if us is not None) for some in (times[2:4], times[4:]))
    cublas, by_torch_us = row.us["cublas"] or 0.0, row.us["torch"] or 0.0
    shown = " | ".join("-" if us is None else f"{us:.2f}" for us in times)
    weight = "all four" if row.outputs is None else f"{row.outputs} x {row.inputs}"
    return (
        f"| {row.model} | {row.name} | {weight} | {row.rows} | {row.num_bytes / 1e6:.2f} | {shown} | "
        f"{row.num_bytes / best / 1e6:.2f} | {cublas / alone:.2f} | {by_torch_us / best:.2f} | {row.apart:.1f} |"
    )


@torch.inference_mode()
def main() -> None:
    """Print a Markdown table; with --json also append each row to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rows", default="1,2,4,8,16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile before anything is timed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU, and these kernels are for one")
    cases = list(product(options.models.split(","), [int(number) for number in options.rows.split(",")]))
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        list(pool.map(warm_up, cases))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16\n\n{HEADER}")
    for model, rows in cases:
        products = products_of(model)
        for name, some in [*((one.name, [one]) for one in products), ("layer", products)]:
            row = measure(model, name, some, rows, flush, options.repeats)
            print(line(row))
            sys.stdout.flush()
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")


if __name__ == "__main__":
    main()
