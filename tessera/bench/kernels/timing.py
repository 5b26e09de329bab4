"""One backend on one part of a case: bound, checked, proven, then called again and again with cold caches."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend
from tessera.attention.cuda import make_event
from tessera.attention.prove import proof_of, prove_call
from tessera.attention.timing import FLUSH_BYTES, Inputs, capture_runs, event_ms, flush_cache, time_plan, wall_ms
from tessera.bench.kernels.cases import Part
from tessera.bench.kernels.inputs import Expected
from tessera.errors import BackendError
from tessera.types import AttentionProof

PLANS = 5
"""Plans that are made; the quickest counts."""
WARM_UP = "reference check, proof"


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


class Eager:
    """A layer, called as it stands."""

    num_layers = 1
    where = ""

    def __init__(self, backend: AttentionBackend[Any], plan: Any, inputs: Inputs) -> None:
        self._backend, self._plan, self._inputs = backend, plan, inputs

    def __call__(self) -> None:
        """The call that is timed."""
        self.answer()

    def warm(self) -> None:
        """The same call on another copy, where there is one: what is timed then finds the host as in an engine."""
        _run(self._backend, self._plan, self._inputs, 1)

    def answer(self) -> Tensor:
        """Of the first copy."""
        return _run(self._backend, self._plan, self._inputs, 0)


class Graph:
    """A layer, recorded once for each copy of its inputs.

    A CUDA graph holds addresses only, so this holds all that a replay reads and writes: the backend and the plan with
    their buffers, the inputs, and the answer.
    """

    where = " in a graph"

    def __init__(self, backend: AttentionBackend[Any], plan: Any, inputs: Inputs) -> None:
        self._backend, self._plan, self._inputs = backend, plan, inputs
        self.num_layers = len(inputs.copies)
        self._answers: dict[int, Tensor] = {}
        self._graph = capture_runs(self._record, self.num_layers)

    def __call__(self) -> None:
        """The call that is timed."""
        self._graph.replay()

    def answer(self) -> Tensor:
        """Of the first copy, by a replay that must write all of it."""
        self._answers[0].fill_(torch.nan)
        self._graph.replay()
        torch.cuda.synchronize()
        return self._answers[0]

    def _record(self, number: int) -> None:
        answer = _run(self._backend, self._plan, self._inputs, number)
        if number == 0:
            self._answers[0] = answer  # of the last call, the captured one: the graph writes there


@dataclass(frozen=True)
class Way:
    """One way of calling a layer."""

    measure: Callable[[], float]
    """Milliseconds of one layer."""
    check: Callable[[], None]
    """Raises BackendError where the answer is not the reference's."""


@dataclass(frozen=True)
class Timed:
    """A backend that answered rightly and is what it says; each call of `sample` times it once."""

    proof: AttentionProof
    """Of the very call that is timed, in the way that counts."""
    plan_ms: float
    error: tuple[float, float]
    """See `Expected.errors`."""
    num_checked: int
    """Tokens whose answer was held against the reference."""
    ways: dict[str, Way]
    """`graph` or `eager`; the first counts."""
    launches: list[float] = field(default_factory=list)
    """Milliseconds on the host of each timed call without a graph, on a GPU: no such call counts as less."""
    devices: list[float] = field(default_factory=list)
    """Milliseconds on the device of the same calls."""
    call: Callable[[], object] | None = None
    """What a profiler looks at: the call without a graph, where there is one."""
    num_layers: int = 1
    """Of that call."""

    @property
    def way(self) -> str:
        """The way that counts."""
        return next(iter(self.ways))

    def device_ms(self, times: dict[str, float]) -> float | None:
        """Milliseconds on the device in the way that counts, of what `sample` just returned; None on a CPU."""
        if self.way == "graph":
            return times["graph"]
        return self.devices[-1] if self.devices else None

    def sample(self) -> dict[str, float]:
        """Milliseconds of one layer, once in each way."""
        return {name: way.measure() for name, way in self.ways.items()}

    def check(self) -> None:
        """Raise BackendError where what was timed does not answer rightly any more."""
        for way in self.ways.values():
            way.check()


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
        return wall_ms(call)

    def event_ms(self, call: Callable[[], object]) -> float:
        """Milliseconds on a GPU, behind writes that also hide the launch, or most of a slow one."""
        return event_ms(call, self.memory)

    def launched_ms(self, call: Callable[[], object], warm: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds that a call on a GPU takes the host to launch, and the device to run.

        A step's layers follow one another, so a layer takes as long as its device or its host, whichever is slower;
        both are taken of the same call, lest many samples of a slow launch be one measurement said many times. The
        call before it was another backend's, which leaves the host's caches cold, and launches then look several times
        as slow as in an engine, where a layer follows a layer: so `warm` runs first, untimed, before the flush.
        """
        start, end = make_event(timing=True), make_event(timing=True)
        warm()
        flush_cache(self.memory)
        start.record()
        began = time.perf_counter()
        call()
        host_ms = 1000 * (time.perf_counter() - began)
        end.record()
        end.synchronize()
        return host_ms, float(start.elapsed_time(end))


def graph_refusal(backend: type[AttentionBackend[Any]], part: Part, mode: str) -> str | None:
    """Why a backend cannot be timed as a graph although only that was asked for."""
    if mode == "graph" and not backend.limits[part.phase].graphs:
        return f"{part.phase}: allows no CUDA graph, and --graph asks for one"
    return None


def uses_graph(backend: type[AttentionBackend[Any]], part: Part, mode: str, device_type: str) -> bool:
    """Whether a backend is timed as a graph: when decoding, or wherever asked for, if its limits allow it."""
    if device_type != "cuda" or mode == "eager" or not backend.limits[part.phase].graphs:
        return False
    return mode == "graph" or part.phase == "decode"


def prepare(backend_class: type[AttentionBackend[Any]], problem: Problem, cold: Cold) -> Timed:
    """Bind, plan, check against the reference, prove. Whatever is wrong is raised, and then there is no time.

    BackendError for a wrong answer and for kernels that are not what the backend claims; else what it raises.
    """
    # The profiler takes CUPTI down when it ends, and a graph that is profiled after that may crash the process:
    # torch.profiler itself sets this, but only for graphs of its own compiler.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    inputs, on_cuda = problem.inputs, problem.inputs.shape.device_type == "cuda"
    backend = backend_class(problem.part.phase, inputs.shape)
    calls: dict[str, tuple[Eager | Graph, float]] = {}
    if uses_graph(backend_class, problem.part, problem.mode, inputs.shape.device_type):
        _require_right(backend, problem, Eager(backend, backend.plan(inputs.batch), inputs))  # compiles, too
        captured = backend.plan_capture(inputs.batch)
        _, plan_ms = time_plan(lambda: backend.update_capture(captured, inputs.batch), PLANS)
        calls["graph"] = Graph(backend, captured, inputs), plan_ms
    if problem.mode != "graph":
        plan, plan_ms = time_plan(lambda: backend.plan(inputs.batch), PLANS)
        calls["eager"] = Eager(backend, plan, inputs), plan_ms
    errors, proofs, launches, devices = [], [], list[float](), list[float]()
    ways: dict[str, Way] = {}
    for name, (call, _) in calls.items():
        errors.append(_require_right(backend, problem, call))
        proofs.append(proof_of(backend, prove_call(backend, call), problem.part.workload, problem.device))
        ways[name] = _way(backend, problem, call, cold, (launches, devices) if on_cuda else None)
    _, plan_ms = calls[next(iter(calls))]
    plain, _ = calls.get("eager") or calls["graph"]
    num_checked = len(problem.expected.rows)
    return Timed(proofs[0], plan_ms, errors[0], num_checked, ways, launches, devices, plain, plain.num_layers)


def _way(
    backend: AttentionBackend[Any],
    problem: Problem,
    call: Eager | Graph,
    cold: Cold,
    clocks: tuple[list[float], list[float]] | None,
) -> Way:
    """How to time a call; where there are `clocks`, on a GPU, one without a graph adds its host's and device's time."""

    def measure() -> float:
        if clocks is None:
            return cold.wall_ms(call)
        if isinstance(call, Graph):
            return cold.event_ms(call) / call.num_layers
        times = cold.launched_ms(call, call.warm)
        for clock, milliseconds in zip(clocks, times):
            clock.append(milliseconds)
        return max(times)

    def check() -> None:
        _require_right(backend, problem, call, " after it was timed")

    return Way(measure, check)


def _run(backend: AttentionBackend[Any], plan: Any, inputs: Inputs, number: int) -> Tensor:
    q, k, v, sinks = inputs.copies[number % len(inputs.copies)]
    return backend.run(plan, q, k, v, sinks)


def _require_right(
    backend: AttentionBackend[Any], problem: Problem, call: Eager | Graph, when: str = ""
) -> tuple[float, float]:
    """The errors of a call's answer; BackendError for an answer that is not the reference's."""
    answer = call.answer()
    if wrong := problem.expected.problem(answer, problem.inputs.copies[0][0]):
        raise BackendError(f"{backend.name} answers wrongly in {backend.phase}{call.where}{when}: {wrong}")
    return problem.expected.errors(answer)
