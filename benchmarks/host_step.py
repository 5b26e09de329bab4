"""What a replayed step costs the host, by part, without a model: tokens are fixed and nothing is computed.

A real runner replays graphs that do nothing (on a CPU, so that copies to a device are copies in memory, done at once),
and the engine overlaps steps as on a GPU. Prints microseconds a step, medians over steps, and a sequence. `runner` is
all of `Runner.begin`, `build_on_host` and `write` are parts of it.

    python benchmarks/host_step.py
    python benchmarks/host_step.py --sequences 256 --turnover 4 --json rows.jsonl
    python benchmarks/host_step.py --sequences 128 --prompts 16    # each step has prompts of 512 tokens beside decodes
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend, Batch, Claim, Limits, Phase, Shape
from tessera.attention.step import Attention
from tessera.engine.engine import Engine
from tessera.engine.garbage import keep_what_is_there
from tessera.runner import graphs
from tessera.runner.graph_sizes import GraphLimits
from tessera.runner.inputs import HostInputs, InputBuilder
from tessera.runner.runner import Runner, RunningStep
from tessera.runner.static_inputs import GraphInputs
from tessera.scheduler.pages import PagePool
from tessera.scheduler.scheduler import Scheduler, SchedulerLimits
from tessera.step import Step, StepResult
from tessera.types import EngineInfo, Request, SamplingParams

PARTS = ("schedule", "begin", "runner", "build_on_host", "write", "result", "commit")
VOCAB_SIZE, EOS, PAGE_SIZE, MAX_MODEL_LEN = 50_000, 2, 16, 2048
PROMPT_LEN = 512
SHAPE = Shape(1, 1, 64, 1.0, torch.float32, "cpu", page_size=PAGE_SIZE)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 0.8, "top_p": 0.9},
}


class Clock:
    """Microseconds of each part of the step that runs."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def timed(self, part: str, function: Callable[[], Any]) -> Any:
        """What the function returns; its time is added to its part's."""
        started = time.perf_counter_ns()
        result = function()
        self.spent[part] += (time.perf_counter_ns() - started) / 1000
        return result


class TimedScheduler(Scheduler):
    """The scheduler, with its parts timed."""

    clock = Clock()

    @property
    def needs_results(self) -> bool:
        """As the scheduler's; part of scheduling."""
        needed: bool = self.clock.timed("schedule", lambda: super(TimedScheduler, self).needs_results)
        return needed

    def schedule(self) -> Step:
        """As the scheduler's."""
        step: Step = self.clock.timed("schedule", super().schedule)
        return step

    def begin(self, step: Step) -> None:
        """As the scheduler's."""
        self.clock.timed("begin", lambda: super(TimedScheduler, self).begin(step))

    def commit(self, step: Step, result: StepResult) -> list[Any]:
        """As the scheduler's."""
        outputs: list[Any] = self.clock.timed("commit", lambda: super(TimedScheduler, self).commit(step, result))
        return outputs


class Nobody(AttentionBackend[None]):
    """Attends to nothing; may be recorded."""

    name: ClassVar[str] = "nobody"
    limits: ClassVar[dict[Phase, Limits]] = dict.fromkeys(
        Phase, Limits((torch.float32,), devices=("cpu",), graphs=True)
    )

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """Nothing."""
        return Claim(())

    def plan(self, batch: Batch) -> None:
        """Nothing."""

    def run(self, plan: None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Nobody calls it."""
        raise RuntimeError("a graph that does nothing is never computed")


class Recordable(Attention):
    """Attention that any graph may record."""

    def graphs_refused(self, phase: Phase, backends: Any) -> list[str]:  # noqa: ARG002
        """Never."""
        return []


class NothingRecorded:
    """A graph whose replay does nothing."""

    def replay(self) -> None:
        """Nothing."""


def capture_nothing(call: Any, warm_up: Any, pool: Any) -> tuple[NothingRecorded, Tensor]:  # noqa: ARG001
    """As attention.cuda.capture."""
    return NothingRecorded(), torch.zeros(1, 1)


class TimedInputs(InputBuilder):
    """The arrays of a step, timed."""

    clock = Clock()

    def build_on_host(self, *given: Any) -> HostInputs:
        """As the builder's."""
        host: HostInputs = self.clock.timed("build_on_host", lambda: super(TimedInputs, self).build_on_host(*given))
        return host


class TimedGraphInputs(GraphInputs):
    """What goes over to the device, timed."""

    clock: ClassVar[Clock] = Clock()

    def write(self, *given: Any) -> None:
        """As the inputs'."""
        self.clock.timed("write", lambda: super(TimedGraphInputs, self).write(*given))


class TimedStep:
    """A step that was done as soon as it began."""

    def __init__(self, running: RunningStep, clock: Clock) -> None:
        self._running, self._clock = running, clock

    def result(self) -> StepResult:
        """The fixed tokens."""
        result: StepResult = self._clock.timed("result", self._running.result)
        return result


class TimedRunner:
    """A runner whose graphs do nothing; tokens are random, and none is EOS."""

    def __init__(self, limits: GraphLimits, clock: Clock) -> None:
        self._clock = TimedGraphInputs.clock = clock
        vars(graphs).update(capture=capture_nothing, graph_pool=lambda: None, GraphInputs=TimedGraphInputs)
        attention = Recordable({phase: [Nobody(phase, SHAPE)] for phase in (Phase.PREFILL, Phase.DECODE)}, [0])
        model: Any = SimpleNamespace(spec=SimpleNamespace(eos_token_ids=[EOS]))
        pages = [torch.empty(limits.num_pages, PAGE_SIZE, 1, 1)]
        device = torch.device("cpu")
        self._runner = Runner(model, attention, pages, pages, device, limits)
        self._runner._inputs = TimedInputs(limits.num_pages, PAGE_SIZE, device)
        self._runner._inputs.clock = clock
        recorded = self._runner._graphs
        assert recorded is not None
        recorded._sampled.random_(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))

    def begin(self, step: Step) -> TimedStep:
        """As the runner's."""
        return TimedStep(self._clock.timed("runner", lambda: self._runner.begin(step)), self._clock)


def make_engine(num_sequences: int, most_tokens: int) -> Engine:
    """An engine that has room for so many sequences, and tokens in a step, and overlaps steps."""
    num_pages = (num_sequences + 8) * MAX_MODEL_LEN // PAGE_SIZE
    limits = SchedulerLimits(num_sequences, most_tokens, MAX_MODEL_LEN, PAGE_SIZE)
    info = EngineInfo(
        "scripted",
        "none",
        "float32",
        "cpu",
        VOCAB_SIZE,
        MAX_MODEL_LEN,
        [EOS],
        PAGE_SIZE,
        num_pages,
        num_sequences,
        most_tokens,
        [],
    )
    scheduler = TimedScheduler(limits, PagePool(num_pages), {EOS})
    scheduler.clock = Clock()
    graph_limits = GraphLimits(num_sequences, MAX_MODEL_LEN, PAGE_SIZE, num_pages, 2**14, 2**20)
    return Engine(TimedRunner(graph_limits, scheduler.clock), scheduler, info, overlap=True)


def measure(num_sequences: int, kind: str, num_steps: int, turnover: int, prompts: int) -> dict[str, float]:
    """Microseconds of each part of a step, and of all of it: medians, means where sequences come and go.

    turnover  after so many steps a sequence ends and another takes its place; 0: never
    prompts   that come with each step and want one token
    """
    engine = make_engine(num_sequences + 2 * prompts, 8192 + num_sequences)
    source = random.Random(0)
    clock: Clock = engine._scheduler.clock  # type: ignore[attr-defined]
    names = iter(range(1_000_000))

    def add() -> None:
        name = next(names)
        tokens = [source.randrange(3, VOCAB_SIZE) for _ in range(source.randrange(64, 192))]
        most = max(1, turnover * (name + 1 if name < num_sequences else num_sequences)) + 32 if turnover else 1700
        engine.add(Request(str(name), tokens, SamplingParams(max_tokens=most, **KINDS[kind])))

    for _ in range(num_sequences):
        add()
    while engine.status().waiting:
        engine.step()
    rows: list[dict[str, float]] = []
    with keep_what_is_there():
        for number in range(32 + num_steps):
            for _ in range(prompts):
                tokens = [source.randrange(3, VOCAB_SIZE) for _ in range(PROMPT_LEN)]
                engine.add(Request(f"{next(names)}", tokens, SamplingParams(max_tokens=1, **KINDS[kind])))
            clock.spent.clear()
            started = time.perf_counter_ns()
            outputs = engine.step()
            whole = (time.perf_counter_ns() - started) / 1000
            if number >= 32:
                rows.append({**{part: clock.spent[part] for part in PARTS}, "step": whole})
            for output in outputs:
                if output.finish_reason and not prompts:
                    add()
    middle = (lambda values: sum(values) / len(values)) if turnover else median
    return {part: middle([row[part] for row in rows]) for part in (*PARTS, "step")}


def main() -> None:
    """Print one Markdown table; with --json append a row of each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--turnover", type=int, default=0, help="steps after which a sequence ends and another comes")
    parser.add_argument("--json", type=Path, help="file to append rows to")
    parser.add_argument("--prompts", type=int, default=0, help=f"of {PROMPT_LEN} tokens, 16 at most, in each step")
    options = parser.parse_args()
    torch.set_num_threads(1)  # what stands for copies to a device is to wait for nobody
    names = [*PARTS, "step", "a sequence"]
    print(f"| sequences | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
    for kind in options.kinds:
        for count in options.sequences:
            found = measure(count, kind, options.steps, options.turnover, options.prompts)
            found["a sequence"] = found["step"] / count
            print(f"| {count} {kind} | {' | '.join(f'{found[name]:,.1f}' for name in names)} |", flush=True)
            if options.json:
                about = {
                    "sequences": count,
                    "kind": kind,
                    "turnover": options.turnover,
                    "prompts": options.prompts,
                    "python": platform.python_version(),
                }
                with options.json.open("a") as file:
                    file.write(json.dumps(about | found) + "\n")


if __name__ == "__main__":
    main()
