"""Device time of calls, by replaying a CUDA graph of several of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch


def graph_times_us(calls: Sequence[Callable[[], object]], replays: int = 30, warm: int = 3) -> dict[str, float]:
    """Microseconds a call: median, lowest and highest over replays of one graph that holds every call once."""
    torch.cuda.synchronize()  # inputs are made on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    for _ in range(warm):
        graph.replay()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in marks:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) * 1000 / len(calls) for start, end in marks)
    return {"us": median(times), "us_min": times[0], "us_max": times[-1]}


def ceilings() -> dict[str, float]:
    """TB/s of a read-only sum and of a copy (read and written bytes counted), TFLOP/s of a bf16 matrix product."""
    x = torch.randn(2**29, device="cuda")
    y = torch.empty_like(x)
    read = graph_times_us([lambda: x.sum()], 20)["us"]
    copy = graph_times_us([lambda: y.copy_(x)], 20)["us"]
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product = graph_times_us([lambda: a @ b], 20)["us"]
    return {
        "read_tbs": 4 * 2**29 / read / 1e6,
        "copy_tbs": 8 * 2**29 / copy / 1e6,
        "bf16_tflops": 2 * 8192**3 / product / 1e6,
    }
