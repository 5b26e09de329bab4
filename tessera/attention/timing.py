"""How long one call of a bound backend takes, with cold caches; on a GPU as a graph where a backend allows one.

Steps of such backends are replayed, or so large that nobody waits for their launches: those of others cost what
launching them costs the host, where that is longer than the device is at work.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend, Batch, Phase, Shape
from tessera.attention.cuda import capture, make_event
from tessera.attention.step import Bucket
from tessera.attention.workloads import make_batch

MAX_COPIES = {"cpu": 3, "cuda": 8}
"""Pools that are read in turn."""
COPIES_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Memory that all pools together may take, where one is not larger by itself."""
FLUSH_BYTES = 2**28
"""Written before every timed call on a GPU: more than any second-level cache holds."""
FLUSHES = 4
"""Such writes before a call: together a quarter of a millisecond on an H200, longer than the host takes for most
libraries' launches; of the slowest a part shows in the time."""
REPEATS = {"cpu": 7, "cuda": 15}
BOX_SECONDS = 0.25
"""Repeating ends after so long."""


@dataclass(frozen=True)
class Inputs:
    """One size of step on one shape: a batch, and for each copy the tensors (q, k, v, sinks) of a layer."""

    shape: Shape
    batch: Batch
    copies: list[tuple[Tensor, Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True)
class CallTime:
    """Milliseconds of planning a step and of running one layer."""

    plan_ms: float
    run_ms: float

    def total(self, num_layers: int) -> float:
        """Of a layer, planning shared out among all."""
        return self.run_ms + self.plan_ms / num_layers


def make_inputs(phase: Phase, shape: Shape, bucket: Bucket, *, max_copies: int | None = None) -> Inputs:
    """Inputs of this size, pages shuffled, on the shape's device; as many copies as are told or memory allows."""
    device = shape.device_type
    tokens = bucket.num_seqs * bucket.q_len
    size: tuple[int, ...]
    if phase is Phase.VISION:
        num_pages, table = 0, torch.zeros(bucket.num_seqs, 0, dtype=torch.int32)
        size = (tokens, shape.num_kv_heads, shape.head_dim)
    else:
        assert shape.page_size is not None
        pages_each = -(-bucket.kv_len // shape.page_size)
        num_pages = bucket.num_seqs * pages_each
        shuffled = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))
        table = shuffled.view(bucket.num_seqs, pages_each).int()
        size = (num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim)
    lens = ((bucket.q_len, bucket.kv_len),) * bucket.num_seqs
    sinks = torch.randn(shape.num_q_heads, device=device) if shape.sinks else None
    q_size = (tokens, shape.num_q_heads, shape.head_dim)
    copies = [
        (_random(q_size, shape), _random(size, shape), _random(size, shape), sinks)
        for _ in range(max_copies or _num_copies(size, shape))
    ]
    return Inputs(shape, make_batch(lens, table, num_pages, device), copies)


def time_call(
    backend: AttentionBackend[Any], inputs: Inputs, *, repeats: int | None = None, give_up_ms: float = math.inf
) -> CallTime:
    """The time of planning and of running, after a first call, which may compile.

    give_up_ms  after a call that takes longer there is no other

    On a GPU the median of several; on a CPU, where other processes get in between, the least.
    """
    repeats = repeats or REPEATS[inputs.shape.device_type]
    if inputs.shape.device_type == "cuda":
        return _time_on_cuda(backend, inputs, repeats, give_up_ms)
    plan, plan_ms = time_plan(lambda: backend.plan(inputs.batch), min(5, repeats))
    run = _runs(backend, plan, inputs)
    run(0)
    return CallTime(plan_ms, min(_repeat(lambda i: wall_ms(lambda: run(i)), repeats, give_up_ms)))


def _time_on_cuda(backend: AttentionBackend[Any], inputs: Inputs, repeats: int, give_up_ms: float) -> CallTime:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    if backend.phase is not Phase.VISION and backend.limits[backend.phase].graphs:
        plan = backend.plan_capture(inputs.batch)
        _, plan_ms = time_plan(lambda: backend.update_capture(plan, inputs.batch), min(5, repeats))
        graph = capture_runs(_runs(backend, plan, inputs), len(inputs.copies))
        copies = len(inputs.copies)
        times = _repeat(lambda _: event_ms(graph.replay, flush), repeats, give_up_ms * copies)
        return CallTime(plan_ms, statistics.median(times) / copies)
    plan, plan_ms = time_plan(lambda: backend.plan(inputs.batch), min(5, repeats))
    run = _runs(backend, plan, inputs)
    run(0)
    torch.cuda.synchronize()
    on_device = _repeat(lambda i: event_ms(lambda: run(i), flush), repeats, give_up_ms)
    if max(on_device) > give_up_ms:  # the host would be done at once with queueing many more
        return CallTime(plan_ms, statistics.median(on_device))
    launches = _repeat(lambda i: wall_ms(lambda: run(i)), min(25, 2 * repeats))  # of the host: nothing waits
    torch.cuda.synchronize()
    return CallTime(plan_ms, max(min(launches), statistics.median(on_device)))  # a host is only ever held up


def _runs(backend: AttentionBackend[Any], plan: Any, inputs: Inputs) -> Callable[[int], Tensor]:
    """A call of one layer; which copy it reads depends on the number it is given."""

    def run(number: int) -> Tensor:
        q, k, v, sinks = inputs.copies[number % len(inputs.copies)]
        return backend.run(plan, q, k, v, sinks)

    return run


def capture_runs(run: Callable[[int], object], num_runs: int) -> torch.cuda.CUDAGraph:
    """One run of each copy as a CUDA graph, replayed once, after two warm-up calls.

    It holds addresses only: whatever `run` reads and writes must be held for as long as it is replayed.
    """
    graph, _ = capture(partial(_in_turn, run, num_runs), partial(_in_turn, run, 2))
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _in_turn(run: Callable[[int], object], times: int) -> None:
    for number in range(times):
        run(number)


def flush_cache(flush: Tensor) -> None:
    """Queue writes over `flush` on the device, after which its cache holds nothing else."""
    for _ in range(FLUSHES):
        flush.zero_()


def event_ms(call: Callable[[], object], flush: Tensor) -> float:
    """Milliseconds on the device, behind writes that empty its cache and that hide the launch."""
    start, end = make_event(timing=True), make_event(timing=True)
    flush_cache(flush)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def time_plan(plan: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """A plan, and the least milliseconds that making one takes after the first."""
    made = plan()
    return made, min(_repeat(lambda _: wall_ms(plan), repeats))


def wall_ms(call: Callable[[], object]) -> float:
    """Milliseconds that a call takes on the host."""
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def _repeat(measure: Callable[[int], float], repeats: int, give_up_ms: float = math.inf) -> list[float]:
    """What `measure` returns, at least once, until the time for it is over or a call has taken too long."""
    end = time.perf_counter() + BOX_SECONDS
    times = []
    for number in range(repeats):
        times.append(measure(number))
        if time.perf_counter() > end or times[-1] > give_up_ms:
            break
    return times


def _random(size: tuple[int, ...], shape: Shape) -> Tensor:
    """Random numbers, of which only a small piece is drawn: drawing all would take longer than timing."""
    if len(size) < 4:
        return torch.randn(size, dtype=shape.dtype, device=shape.device_type)
    page = torch.randn(size[1:], dtype=shape.dtype, device=shape.device_type)
    return page.expand(size).contiguous()


def _num_copies(size: tuple[int, ...], shape: Shape) -> int:
    num_bytes = 2 * shape.dtype.itemsize
    for length in size:
        num_bytes *= length
    return max(1, min(MAX_COPIES[shape.device_type], COPIES_BYTES[shape.device_type] // num_bytes))
