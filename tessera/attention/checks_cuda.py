"""The checks of the conformance kit that only a GPU can answer: CUDA graphs, and `run` that never waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tessera.attention.checks import MIXED, NotClaimed, Problems, Subject
from tessera.attention.contract import AttentionBackend, Phase
from tessera.attention.workloads import Case, Workload

LARGEST = {
    Phase.PREFILL: Workload(((16, 300), (16, 300), (16, 300), (16, 300))),
    Phase.DECODE: Workload(((1, 700),) * 6),
    Phase.VISION: Workload(((90, 90),) * 3),
}
"""What a graph is captured with: the largest lengths it will be replayed with."""
REPLAYS = {
    Phase.PREFILL: (
        Workload(((16, 16), (16, 300), (16, 17), (16, 100))),
        Workload(((10, 40), (16, 16), (3, 200), (0, 0))),
        Workload(((3, 30), (61, 200), (0, 0), (0, 0))),
    ),
    Phase.DECODE: (
        Workload(((1, 1), (1, 17), (1, 700), (1, 64), (1, 65), (1, 300))),
        Workload(((1, 5), (1, 120), (1, 0), (1, 0), (1, 0), (1, 0))),
        Workload(((1, 700),) * 6),
    ),
    Phase.VISION: (Workload(((1, 1), (90, 90), (33, 33))), Workload(((64, 64), (64, 64), (0, 0)))),
}
"""What it is replayed with; sequences of no keys are padding rows."""
GARBAGE = 1e4


class Recorded(Protocol):
    """A recorded `run`."""

    def replay(self) -> None:
        """Run it again on the same addresses."""


Capture = Callable[[AttentionBackend[Any], Any, Case], tuple[Recorded, Tensor]]
"""From a bound backend, its plan and the captured case to a recorded `run` and the tensor that it writes to."""


def graph_replay(subject: Subject, window: int | None = None) -> Problems:
    """A graph of `run`, captured with the largest lengths, gives the oracle's answer for others and padding rows."""
    if not subject.limits.graphs:
        raise NotClaimed("the limits do not say graphs")
    if subject.base.device_type != "cuda":
        raise NotClaimed(f"CUDA graphs need a CUDA device, this is {subject.base.device_type}")
    return replay_problems(subject, window, _capture)


def replay_problems(subject: Subject, window: int | None, capture: Capture) -> Problems:
    """What a recorded `run` answers wrongly for lengths other than the captured ones."""
    static = subject.case(replace(LARGEST[subject.phase], window=window))
    bound = subject.backend(subject.phase, static.shape)
    most = sum(static.batch.q_lens_cpu) if subject.phase is Phase.PREFILL else static.batch.max_q_len
    plan = bound.plan_capture(replace(static.batch, max_q_len=most))
    graph, out = capture(bound, plan, static)
    for number, asked in enumerate(REPLAYS[subject.phase], 1):
        case = _load(static, subject.case(replace(asked, window=window)))
        bound.update_capture(plan, case.batch)
        out.fill_(torch.nan)
        graph.replay()
        if problems := case.problems(out[: len(case.q)]):
            return [f"{problem} in replay {number}, lengths {asked.lens}" for problem in problems]
    return []


def no_wait(subject: Subject) -> Problems:
    """`run` launches and returns: what waits for the GPU cannot be recorded and slows every layer."""
    if subject.base.device_type != "cuda":
        raise NotClaimed(f"only a CUDA device can be waited for, this is {subject.base.device_type}")
    case = subject.case(MIXED[subject.phase])
    bound = subject.backend(subject.phase, case.shape)
    plan = bound.plan(case.batch)
    bound.run(plan, case.q, case.k, case.v)  # compiles where the backend compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        bound.run(plan, case.q, case.k, case.v)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return ["run() waits for the GPU, only plan() may"]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return []


def _capture(bound: AttentionBackend[Any], plan: Any, static: Case) -> tuple[Recorded, Tensor]:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what compiles or chooses on its first call must do so before the capture
        for _ in range(2):
            bound.run(plan, static.q, static.k, static.v, static.sinks)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bound.run(plan, static.q, static.k, static.v, static.sinks)
    return graph, out


def _load(static: Case, case: Case) -> Case:
    """Write a case into the captured buffers, garbage around it, as the runner does; the case over those buffers."""
    batch, new = static.batch, case.batch
    for buffer, values in ((static.q, case.q), (static.k, case.k), (static.v, case.v)):
        buffer.fill_(GARBAGE)
        buffer[: len(values)] = values
    batch.cu_q_lens.copy_(new.cu_q_lens)
    batch.kv_lens.copy_(new.kv_lens)
    batch.page_table.zero_()
    batch.page_table[:, : new.page_table.shape[1]] = new.page_table
    loaded = replace(
        new,
        cu_q_lens=batch.cu_q_lens,
        kv_lens=batch.kv_lens,
        page_table=batch.page_table,
        num_pages=batch.num_pages,
    )
    return replace(case, batch=loaded, q=static.q[: len(case.q)], k=static.k, v=static.v)
