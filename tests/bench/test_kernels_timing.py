"""What is timed is right, is alive, is proven itself, and each sample is a measurement of its own."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tessera.attention import registry
from tessera.attention.backends.naive import Naive
from tessera.attention.backends.torch_sdpa import TorchSdpaFlash
from tessera.attention.contract import Batch, Phase, Shape
from tessera.attention.prove import prove_call
from tessera.bench.kernels import ceilings
from tessera.bench.kernels import timing as kernel_timing
from tessera.bench.kernels.benchmark import KernelBenchmark
from tessera.bench.kernels.cases import Heads, KernelCase, Part, parse_workload, parts_of
from tessera.bench.kernels.cost import Cost
from tessera.bench.kernels.entrants import Entrant
from tessera.bench.kernels.figures import Runner, metrics_of
from tessera.bench.kernels.inputs import expected_of, make_part_inputs
from tessera.bench.kernels.timing import Cold, Graph, Problem, Timed, prepare
from tessera.bench.record import Record
from tessera.errors import BackendError
from tessera.types import AttentionProof


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.GEMM_SIZE, "cpu", 64)
    monkeypatch.setitem(ceilings.MOVE_BYTES, "cpu", 2**16)
    monkeypatch.setitem(ceilings.SECONDS, "cpu", 0.0)
    monkeypatch.setattr(kernel_timing, "FLUSH_BYTES", 2**16)


class HeldPlan(list[Any]):
    """A plan that can be watched."""


class Watched(Naive):
    """Its plan for a graph is known to nobody but those who hold it."""

    name: ClassVar[str] = "watched"
    plans: ClassVar[list[weakref.ref[HeldPlan]]] = []

    def plan_capture(self, batch: Batch) -> Any:
        plan = HeldPlan(self.plan(batch))
        Watched.plans.append(weakref.ref(plan))
        return plan


class FakeGraph:
    """As a CUDA graph: holds no object, and writes the answer anew as long as what it reads is alive."""

    def __init__(self, run: Callable[[int], object], num_runs: int) -> None:
        for number in range(num_runs):
            run(number)
        recorder = getattr(run, "__self__", None)
        assert isinstance(recorder, Graph)
        written = recorder._answers[0]
        self.answer, self.numbers = weakref.ref(written), written.clone()
        self.broken = False

    def replay(self) -> None:
        answer, plan = self.answer(), Watched.plans[-1]()
        assert answer is not None and plan is not None, "a graph was replayed whose buffers had been freed"
        if not self.broken:
            answer.copy_(self.numbers)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    made: list[FakeGraph] = []

    def capture(run: Callable[[int], object], num_runs: int) -> FakeGraph:
        made.append(FakeGraph(run, num_runs))
        return made[-1]

    def event_ms(call: Callable[[], object], _: Tensor) -> float:
        call()
        return 6.0

    monkeypatch.setattr(kernel_timing, "capture_runs", capture)
    monkeypatch.setattr(kernel_timing, "event_ms", event_ms)
    monkeypatch.setattr(kernel_timing, "uses_graph", lambda *_: True)
    monkeypatch.setattr(kernel_timing, "prove_call", lambda *_: [])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made


def graph_of_two_copies(monkeypatch: pytest.MonkeyPatch) -> Timed:
    part = Part(Phase.DECODE, parse_workload("3q1s40"))
    shape = Shape(4, 2, 32, 0.2, torch.float32, "cpu", page_size=16)
    inputs = make_part_inputs(part, shape, 2, 0)
    problem = Problem(part, inputs, expected_of(part, inputs), "graph", "a device")
    # The device is a CPU's all the same: only the way of timing is a GPU's.
    monkeypatch.setattr(Cold, "wall_ms", lambda self, call: self.event_ms(call) / call.num_layers)
    return prepare(Watched, problem, Cold("cpu"))


@pytest.mark.usefixtures("graphs")
def test_all_that_a_graph_reads_lives_as_long_as_it_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = graph_of_two_copies(monkeypatch)
    gc.collect()
    assert timed.sample() == {"graph": 3.0}, "of one of two layers"
    timed.check()
    del timed
    gc.collect()
    assert Watched.plans[-1]() is None, "the test would not see who holds it"


def test_a_graph_that_answers_no_more_after_it_was_timed_is_refused(
    graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = graph_of_two_copies(monkeypatch)
    timed.sample()
    graphs[0].broken = True  # the right answer of before still lies there
    with pytest.raises(BackendError, match="watched answers wrongly in decode in a graph after it was timed"):
        timed.check()


class Tires(Naive):
    """Right when it is checked first, wrong later."""

    name: ClassVar[str] = "tires"
    calls: ClassVar[int] = 0

    def run(self, plan: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        Tires.calls += 1
        return super().run(plan, q, k, v, sinks) * (1 if Tires.calls <= 3 else 0)


class PlainWhenMixed(TorchSdpaFlash):
    """Fused as it claims, but for batches whose sequences differ."""

    name: ClassVar[str] = "plain_when_mixed"

    def plan(self, batch: Batch) -> Any:
        if len(set(batch.q_lens_cpu)) == 1:
            return super().plan(batch)
        plain = Naive(self.phase, self.shape)
        return plain, plain.plan(batch)

    def run(self, plan: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        if isinstance(plan, tuple) and isinstance(plan[0], Naive):
            return plan[0].run(plan[1], q, k, v, sinks)
        return super().run(plan, q, k, v, sinks)


def rows_of(workload: str, backend: type[Naive] | type[TorchSdpaFlash], monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setitem(registry.BACKENDS, backend.name, f"{__name__}:{backend.__name__}")
    parts = next(parts_of(parse_workload(workload), (Phase.PREFILL, Phase.DECODE)))
    case = KernelCase(parts, Heads(4, 2, 32), "float32", 16)
    return list(KernelBenchmark([case], backends=backend.name, device="cpu", repeats=2).records())[-1]


def test_an_answer_that_goes_wrong_while_it_is_timed_leaves_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    row = rows_of("2q1s40", Tires, monkeypatch)
    assert row.status == "failed" and "tires answers wrongly in decode after it was timed" in row.reason


def test_the_proof_is_of_the_call_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    alike, mixed = (rows_of(workload, PlainWhenMixed, monkeypatch) for workload in ("2q40", "2q40_q5"))
    assert alike.status == "ok" and [proof.step for proof in alike.subject.proofs] == ["2q40"]
    assert mixed.status == "failed" and "is not what attends in prefill" in mixed.reason


class FakeEvent:
    """The device took as long as `device_ms` says, call by call."""

    device_ms: ClassVar[list[float]] = []

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: FakeEvent) -> float:
        return FakeEvent.device_ms.pop(0)


def test_each_sample_of_a_short_kernel_has_the_launch_of_its_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_timing, "make_event", lambda **_: FakeEvent())
    FakeEvent.device_ms = [0.01, 0.01, 500.0]
    cold, seconds = Cold("cpu"), [0.002, 0.03, 0.002]
    samples = [cold.launched_ms(lambda: time.sleep(seconds.pop(0)), lambda: None) for _ in range(3)]
    (short, _), (long, _), (host, _) = samples
    assert short >= 2 and long >= 30 and 2 <= host < 500 and short != long
    assert [device for _, device in samples] == [0.01, 0.01, 500.0]


def test_a_timed_call_finds_a_warm_host_and_cold_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_timing, "make_event", lambda **_: FakeEvent())
    FakeEvent.device_ms = [1.0]
    cold, order = Cold("cpu"), list[str]()
    cold.memory.fill_(1.0)

    def called(what: str) -> None:
        order.append(f"{what}, {'flushed' if not cold.memory.any() else 'not flushed'}")

    cold.launched_ms(lambda: called("timed"), lambda: called("warm-up"))
    assert order == ["warm-up, not flushed", "timed, flushed"]


@pytest.mark.parametrize(("seconds", "device_ms", "longest"), [(0.03, 1.0, "host"), (0.0, 500.0, "device")])
def test_a_sample_on_a_gpu_is_the_longer_of_host_and_device_and_both_are_kept(
    seconds: float, device_ms: float, longest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_timing, "make_event", lambda **_: FakeEvent())
    FakeEvent.device_ms = [device_ms]
    part = Part(Phase.DECODE, parse_workload("3q1s40"))
    inputs = make_part_inputs(part, Shape(4, 2, 32, 0.2, torch.float32, "cpu", page_size=16), 2, 0)
    problem = Problem(part, inputs, expected_of(part, inputs), "eager", "a device")
    copies: list[int] = []

    def run(backend: Any, plan: Any, inputs: Any, number: int) -> Tensor:
        copies.append(number)
        time.sleep(seconds)
        return plain(backend, plan, inputs, number)

    plain = kernel_timing._run
    timed = prepare(Naive, problem, Cold("cpu"))
    monkeypatch.setattr(kernel_timing, "_run", run)
    backend = Naive(Phase.DECODE, inputs.shape)
    call = kernel_timing.Eager(backend, backend.plan(inputs.batch), inputs)
    way = kernel_timing._way(backend, problem, call, Cold("cpu"), (timed.launches, timed.devices))
    runner = Runner(Entrant({Phase.DECODE: "naive"}), [replace(timed, ways={"eager": way})])
    runner.sample()
    assert copies == [1, 0], "the warm-up reads another copy"
    times = {"host": runner.samples["decode_launch_ms"], "device": runner.samples["device_ms"]}
    assert times["device"] == [device_ms] and runner.samples["ms"] == times[longest]
    assert metrics_of(runner, Cost(1.0, 1.0), 1)["device_ms_median"] == device_ms


def test_a_cpu_has_no_device_time(monkeypatch: pytest.MonkeyPatch) -> None:
    row = rows_of("2q1s40", Naive, monkeypatch)
    assert "device_ms_median" not in row.metrics and set(row.samples) == {"ms"}


def test_the_hosts_part_of_each_sample_is_kept_and_its_median_a_figure() -> None:
    launches: list[float] = []

    def measure() -> float:
        launches.append(len(launches) + 1.0)
        return 2 * launches[-1]

    proof = AttentionProof("decode", "naive", None, [], None, "q1", {}, "cpu")
    way = kernel_timing.Way(measure, lambda: None)
    runner = Runner(Entrant({Phase.DECODE: "naive"}), [Timed(proof, 0.1, (0.0, 0.0), 1, {"eager": way}, launches)])
    for _ in range(3):
        runner.sample()
    assert runner.samples == {"ms": [2.0, 4.0, 6.0], "decode_launch_ms": [1.0, 2.0, 3.0]}
    metrics = metrics_of(runner, Cost(1.0, 1.0), 1)
    assert (metrics["ms_median"], metrics["decode_launch_ms"]) == (4.0, 2.0)


def test_the_profiler_is_told_to_leave_cupti_alone_before_it_first_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def watched(*arguments: Any) -> Any:
        seen.append(os.environ.get("TEARDOWN_CUPTI"))
        return prove_call(*arguments)

    monkeypatch.setenv("TEARDOWN_CUPTI", "")
    monkeypatch.delenv("TEARDOWN_CUPTI")
    monkeypatch.setattr(kernel_timing, "prove_call", watched)
    assert rows_of("2q1s40", Naive, monkeypatch).status == "ok"
    assert seen == ["0"]
