"""What a machine can do at most, measured: reading, copying, and products of matrices in a dtype."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.bench.benchmark import Done
from tessera.bench.provenance import Provenance
from tessera.bench.record import Conditions, Record, Subject

MOVE_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""Read at once: far more than any cache holds."""
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
SECONDS = {"cpu": 0.25, "cuda": 0.25}
"""Each thing is repeated for so long, at least three times."""
MAX_REPEATS = 30


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


def measure_ceilings(device: str, dtypes: list[torch.dtype]) -> list[Measurement]:
    """Measure `device`, products in each dtype and on a CPU in float32 too; about a second on a CPU.

    On a GPU it takes 8 GiB of memory for that time, or half of what is free.
    """
    wanted = dict.fromkeys([*dtypes, torch.float32] if device == "cpu" else dtypes)
    found = [*_moves(device), *(_gemm(device, dtype) for dtype in wanted)]
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


def ceilings_of(measured: list[Measurement], dtype: str) -> Ceilings:
    """The ceilings for kernels in `dtype`, named as torch names it."""
    flops = [each.per_second for each in measured if each.name == "gemm" and each.dtype in (dtype, "float32")]
    return Ceilings(max(each.per_second for each in measured if each.name != "gemm"), max(flops))


def ceiling_records(
    measured: list[Measurement], device: str, provenance: Provenance, done: Container[Done] = ()
) -> Iterator[Record]:
    """A row a measurement."""
    for each in measured:
        name, value = each.metric
        row = Record(
            kind="ceiling",
            case={"ceiling": each.name, "dtype": each.dtype, "device": device},
            subject=Subject(f"torch {each.name}", engine="torch", note="no attention: nothing to prove"),
            status="ok",
            conditions=Conditions(dtype=each.dtype, device=device, warmup="1 call", cache="cold"),
            provenance=provenance,
            metrics={name: value},
            samples={"ms": each.ms},
        )
        if Done(row.case_key, row.subject.label, row.repeat) not in done:
            yield row


def num_ceilings(device: str, dtypes: list[torch.dtype]) -> int:
    """How many rows there will be."""
    return 2 + len({*dtypes, torch.float32} if device == "cpu" else set(dtypes))


def _moves(device: str) -> list[Measurement]:
    num_bytes = MOVE_BYTES[device]
    if device == "cuda":
        num_bytes = min(num_bytes, torch.cuda.mem_get_info()[0] // 4)
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    num_bytes = source.numel() * 4
    return [
        Measurement("read", "float32", num_bytes, _times(source.sum, device)),
        Measurement("copy", "float32", 2 * num_bytes, _times(lambda: target.copy_(source), device)),
    ]


def _gemm(device: str, dtype: torch.dtype) -> Measurement:
    size = GEMM_SIZE[device]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    name = str(dtype).removeprefix("torch.")
    return Measurement("gemm", name, 2.0 * size**3, _times(lambda: torch.mm(left, right, out=out), device))


def _times(call: Callable[[], Tensor], device: str) -> list[float]:
    """Milliseconds of several calls after a first one; on a GPU by its own clock."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    times: list[float] = []
    end = time.perf_counter() + SECONDS[device]
    while len(times) < 3 or (time.perf_counter() < end and len(times) < MAX_REPEATS):
        times.append(_event_ms(call) if device == "cuda" else _wall_ms(call))
    return times


def _event_ms(call: Callable[[], Tensor]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _wall_ms(call: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000
