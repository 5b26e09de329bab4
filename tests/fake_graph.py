"""What a CUDA graph does, where there is none, for checks of replays on a CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tessera.attention.contract import AttentionBackend
from tessera.attention.workloads import Case


class FakeGraph:
    """The same call on the same tensors, into the same answer."""

    def __init__(self, bound: AttentionBackend[Any], plan: Any, static: Case) -> None:
        self.bound, self.plan, self.static = bound, plan, static
        self.out = self.call()

    def call(self) -> Tensor:
        static = self.static
        return self.bound.run(self.plan, static.q, static.k, static.v, static.sinks)

    def replay(self) -> None:
        answer = self.call()
        self.out[: len(answer)] = answer


def capture_fake(bound: AttentionBackend[Any], plan: Any, static: Case) -> tuple[FakeGraph, Tensor]:
    """As `checks_cuda.Capture`."""
    graph = FakeGraph(bound, plan, static)
    return graph, graph.out
