"""One backend on one part of a case: bound, checked, proven, then called again and again with cold caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend
from tessera.attention.prove import claim_problems, family_problems, profile_kernels, proof_alone
from tessera.attention.step import Bucket
from tessera.attention.timing import FLUSH_BYTES, Inputs, _capture, _event_ms, _time_plan, _wall_ms
from tessera.bench.kernels.cases import Part
from tessera.bench.kernels.inputs import Expected
from tessera.errors import BackendError
from tessera.types import AttentionProof

PLANS = 5
"""Plans that are made; the quickest counts."""
LAUNCHES = 25
"""Calls whose time on the host is taken, where a device does the work; the quickest counts."""
WARM_UP = "reference check, proof, 1 call"


@dataclass(frozen=True)
class Problem:
    """What a part asks of every backend."""

    part: Part
    inputs: Inputs
    expected: Expected
    mode: str
    """As of a KernelCase."""
    device: str
    """As the device calls itself."""

    @property
    def size(self) -> Bucket:
        """The sequences that hold most, for a proof."""
        return Bucket(*max(((g.count, g.q_len, g.kv_len) for g in self.part.groups), key=lambda g: g[0] * g[2]))


@dataclass(frozen=True)
class Timed:
    """A backend that answered rightly and is what it says; each call of `sample` times it once."""

    proof: AttentionProof
    plan_ms: float
    error: tuple[float, float]
    """See `Expected.errors`."""
    num_checked: int
    """Tokens whose answer was held against the reference."""
    ways: dict[str, Callable[[], float]]
    """`graph` or `eager` -> milliseconds of one layer; the first is how it runs in the engine, or as was asked."""
    launch_ms: float | None = None
    """Time on the host of one call without a graph, on a GPU; no call without a graph takes less."""

    @property
    def way(self) -> str:
        """The way that counts."""
        return next(iter(self.ways))

    def sample(self) -> dict[str, float]:
        """Milliseconds of one layer, once in each way."""
        return {way: measure() for way, measure in self.ways.items()}


class Cold:
    """Memory that is written (on a CPU read) before every timed call, so that it finds nothing in a cache."""

    def __init__(self, device_type: str) -> None:
        if device_type == "cuda":
            self.memory = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        else:
            self.memory = torch.ones(FLUSH_BYTES // 4)

    def empty(self) -> None:
        """Read it, on a CPU: that fills every level, where large writes may go past them."""
        self.memory.sum()

    def wall_ms(self, call: Callable[[], object]) -> float:
        """Milliseconds on a CPU."""
        self.empty()
        return _wall_ms(call)

    def event_ms(self, call: Callable[[], object]) -> float:
        """Milliseconds on a GPU, behind a write that also hides the launch."""
        return _event_ms(call, self.memory)


def graph_refusal(backend: type[AttentionBackend[Any]], part: Part, mode: str) -> str | None:
    """Why a backend cannot be timed as a graph although only that was asked for."""
    if mode == "graph" and not backend.limits[part.phase].graphs:
        return f"{part.phase}: allows no CUDA graph, and --graph asks for one"
    return None


def uses_graph(backend: type[AttentionBackend[Any]], part: Part, mode: str, device_type: str) -> bool:
    """Whether a graph is how this backend runs: in the engine for decoding, where its limits allow it."""
    if device_type != "cuda" or mode == "eager" or not backend.limits[part.phase].graphs:
        return False
    return mode == "graph" or part.phase == "decode"


def prepare(backend_class: type[AttentionBackend[Any]], problem: Problem, cold: Cold) -> Timed:
    """Bind, check against the reference, prove, plan. Whatever is wrong is raised, and then there is no time.

    BackendError for a wrong answer and for kernels that are not what the backend claims; else what it raises.
    """
    inputs, part = problem.inputs, problem.part
    device_type = inputs.shape.device_type
    backend = backend_class(part.phase, inputs.shape)
    plan = backend.plan(inputs.batch)
    answer = _run(backend, plan, inputs, 0)
    _require_right(backend, problem, answer, "")
    error = problem.expected.errors(answer)
    del answer
    proof = proof_alone(backend, problem.size, problem.device)
    ways: dict[str, Callable[[], float]] = {}
    plan_ms, launch_ms = 0.0, None
    if uses_graph(backend_class, part, problem.mode, device_type):
        measure, plan_ms = _graph(backend, problem, cold)
        ways["graph"] = measure
    if problem.mode != "graph":
        plan, eager_plan_ms = _time_plan(lambda: backend.plan(inputs.batch), PLANS)
        plan_ms = plan_ms if ways else eager_plan_ms
        if device_type == "cuda":
            ways["eager"], launch_ms = _eager_on_cuda(backend, plan, inputs, cold)
        else:
            _run(backend, plan, inputs, 0)
            ways["eager"] = lambda: cold.wall_ms(lambda: _run(backend, plan, inputs, 0))
    return Timed(proof, plan_ms, error, len(problem.expected.rows), ways, launch_ms)


def _eager_on_cuda(
    backend: AttentionBackend[Any], plan: Any, inputs: Inputs, cold: Cold
) -> tuple[Callable[[], float], float]:
    """How to time a call without a graph, and the host's part of it, which a short kernel cannot hide."""
    _run(backend, plan, inputs, 0)
    torch.cuda.synchronize()
    launch_ms = min(_wall_ms(lambda: _run(backend, plan, inputs, 0)) for _ in range(LAUNCHES))
    torch.cuda.synchronize()
    return lambda: max(launch_ms, cold.event_ms(lambda: _run(backend, plan, inputs, 0))), launch_ms


def _graph(backend: AttentionBackend[Any], problem: Problem, cold: Cold) -> tuple[Callable[[], float], float]:
    """How to time a layer within a graph of one call a copy, whose answer and kernels are checked as well."""
    inputs = problem.inputs
    plan = backend.plan_capture(inputs.batch)
    _, plan_ms = _time_plan(lambda: backend.update_capture(plan, inputs.batch), PLANS)
    answers: dict[int, Tensor] = {}

    def run(number: int) -> Tensor:
        answer = _run(backend, plan, inputs, number)
        if number == 0:
            answers[0] = answer  # of the last call, the captured one: the graph writes there
        return answer

    num_runs = len(inputs.copies)
    graph = _capture(run, num_runs)
    graph.replay()
    torch.cuda.synchronize()
    _require_right(backend, problem, answers[0], " in a graph")
    claim = backend.claim(backend.phase, backend.shape)
    uses = profile_kernels(graph.replay, "cuda", claim.must)
    if problems := claim_problems(claim, uses) + family_problems(backend.name, uses):
        raise BackendError(f"{backend.name} is not what attends in a graph: {'; '.join(dict.fromkeys(problems))}")
    return lambda: cold.event_ms(graph.replay) / num_runs, plan_ms


def _run(backend: AttentionBackend[Any], plan: Any, inputs: Inputs, number: int) -> Tensor:
    q, k, v, sinks = inputs.copies[number % len(inputs.copies)]
    return backend.run(plan, q, k, v, sinks)


def _require_right(backend: AttentionBackend[Any], problem: Problem, answer: Tensor, where: str) -> None:
    """Raise BackendError for an answer that is not the reference's."""
    if wrong := problem.expected.problem(answer, problem.inputs.copies[0][0]):
        raise BackendError(f"{backend.name} answers wrongly in {backend.phase}{where}: {wrong}")
