"""What a machine can do at most, measured: reading, copying, and products of matrices in a dtype."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tessera.attention.cuda import make_event
from tessera.attention.timing import wall_ms
from tessera.bench.benchmark import Done
from tessera.bench.kernels.context import Context, one_line
from tessera.bench.provenance import Provenance
from tessera.bench.record import Conditions, Record, Subject

MOVE_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""Read at once: far more than any cache holds."""
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
SECONDS = {"cpu": 0.25, "cuda": 0.25}
"""Each thing is repeated for so long, at least three times."""
MAX_REPEATS = 30
_Maker = Callable[[str], tuple[float, list[float]]]
"""Measures one thing on a device: the amount, and milliseconds of each call."""


@dataclass(frozen=True)
class Measurement:
    """One thing, done several times."""

    name: str
    """`read`, `copy`, or `gemm`."""
    dtype: str
    """Of the numbers that were read or multiplied."""
    amount: float
    """Bytes that one call moves (of a copy both ways), of `gemm` operations."""
    ms: list[float]
    """[] where it failed."""
    failure: str = ""
    """Why."""

    @property
    def per_second(self) -> float:
        """Bytes or operations, in the best call: a ceiling is what the machine reached once."""
        return 1000 * self.amount / min(self.ms)

    @property
    def metric(self) -> tuple[str, float]:
        """As a Record has it: `tb_s` or `tflop_s`."""
        return ("tflop_s" if self.name == "gemm" else "tb_s", self.per_second / 1e12)


@dataclass(frozen=True)
class Ceilings:
    """Of one device and one dtype."""

    bytes_s: float
    """The better of reading and copying."""
    flop_s: float
    """Of a large product of matrices in the dtype; on a CPU in float32 where that is faster, for nobody is held to
    numbers that the processor cannot multiply."""


def measure_ceilings(device: str, dtypes: list[torch.dtype], context: Context | None = None) -> list[Measurement]:
    """Measure `device`, products in each dtype and on a CPU in float32 too; about a second on a CPU.

    On a GPU it takes 8 GiB of memory for that time, or half of what is free. What does not fit, or fails otherwise, is
    a measurement that says so; `context` is told.
    """
    context = context or Context(device)
    wanted = dict.fromkeys([*dtypes, torch.float32] if device == "cpu" else dtypes)
    makers: dict[tuple[str, str], _Maker] = {("read", "float32"): _read, ("copy", "float32"): _copy}
    makers |= {("gemm", str(dtype).removeprefix("torch.")): partial(_gemm, dtype) for dtype in wanted}
    found = [_measured(make, name, dtype, device, context) for (name, dtype), make in makers.items()]
    context.tidy()
    return found


def ceilings_of(measured: list[Measurement], dtype: str) -> Ceilings | None:
    """The ceilings for kernels in `dtype`, named as torch names it; None where they could not be measured."""
    done = [each for each in measured if not each.failure]
    flops = [each.per_second for each in done if each.name == "gemm" and each.dtype in (dtype, "float32")]
    moves = [each.per_second for each in done if each.name != "gemm"]
    return Ceilings(max(moves), max(flops)) if moves and flops else None


def ceiling_records(
    measured: list[Measurement], device: str, provenance: Provenance, done: Container[Done] = ()
) -> Iterator[Record]:
    """A row a measurement."""
    for each in measured:
        row = Record(
            kind="ceiling",
            case={"ceiling": each.name, "dtype": each.dtype, "device": device},
            subject=Subject(f"torch {each.name}", engine="torch", note="no attention: nothing to prove"),
            status="failed" if each.failure else "ok",
            reason=each.failure,
            conditions=Conditions(dtype=each.dtype, device=device, warmup="1 call", cache="cold"),
            provenance=provenance,
            metrics={} if each.failure else dict([each.metric]),
            samples={} if each.failure else {"ms": each.ms},
        )
        if Done(row.case_key, row.subject.label, row.repeat) not in done:
            yield row


def num_ceilings(device: str, dtypes: list[torch.dtype]) -> int:
    """How many rows there will be."""
    return 2 + len({*dtypes, torch.float32} if device == "cpu" else set(dtypes))


def _measured(make: _Maker, name: str, dtype: str, device: str, context: Context) -> Measurement:
    """What `make` measured, or why it could not."""
    if context.lost:
        return Measurement(name, dtype, 0.0, [], context.lost)
    try:
        return Measurement(name, dtype, *make(device))
    except Exception as error:  # out of memory, most of all
        failure = one_line(error)
    context.probe(f"the ceiling of {name} in {dtype}", failure)
    return Measurement(name, dtype, 0.0, [], failure)


def _read(device: str) -> tuple[float, list[float]]:
    source = torch.ones(_num_floats(device), device=device)
    return 4.0 * source.numel(), _times(source.sum, device)


def _copy(device: str) -> tuple[float, list[float]]:
    source = torch.ones(_num_floats(device), device=device)
    target = torch.empty_like(source)
    return 8.0 * source.numel(), _times(lambda: target.copy_(source), device)


def _num_floats(device: str) -> int:
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else None
    return (MOVE_BYTES[device] if free is None else min(MOVE_BYTES[device], free // 4)) // 4


def _gemm(dtype: torch.dtype, device: str) -> tuple[float, list[float]]:
    size = GEMM_SIZE[device]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2.0 * size**3, _times(lambda: torch.mm(left, right, out=out), device)


def _times(call: Callable[[], Tensor], device: str) -> list[float]:
    """Milliseconds of several calls after a first one; on a GPU by its own clock."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    times: list[float] = []
    end = time.perf_counter() + SECONDS[device]
    while len(times) < 3 or (time.perf_counter() < end and len(times) < MAX_REPEATS):
        times.append(_event_ms(call) if device == "cuda" else wall_ms(call))
    return times


def _event_ms(call: Callable[[], Tensor]) -> float:
    start, end = make_event(timing=True), make_event(timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
