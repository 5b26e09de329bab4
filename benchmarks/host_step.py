"""What a decode step costs the host, by part, without a model: tokens are fixed and nothing is computed.

A scripted executor does all that the host does for a step of decodes that is replayed as a CUDA graph (on a CPU, so
without copies to a device), and the engine overlaps steps as on a GPU. Prints microseconds a step, medians over steps,
and a sequence.

    python benchmarks/host_step.py
    python benchmarks/host_step.py --sequences 256 --turnover 4 --json rows.jsonl
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
from typing import Any

import torch

from tessera.engine.engine import Engine
from tessera.engine.garbage import keep_what_is_there
from tessera.runner.graphs import GraphLimits, StaticInputs
from tessera.runner.inputs import InputBuilder, LastSampled
from tessera.runner.sampler import Sampled
from tessera.scheduler.pages import PagePool
from tessera.scheduler.scheduler import Scheduler, SchedulerLimits
from tessera.step import Step, StepResult
from tessera.types import EngineInfo, Request, SamplingParams

PARTS = ("schedule", "begin", "build_on_host", "write", "parameters", "result", "commit")
VOCAB_SIZE, EOS, PAGE_SIZE, MAX_MODEL_LEN = 50_000, 2, 16, 2048
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


class ScriptedStep:
    """A step that was done as soon as it began."""

    def __init__(self, sampled: Sampled, clock: Clock) -> None:
        self._sampled, self._clock = sampled, clock

    def result(self) -> StepResult:
        """The fixed tokens."""
        result: StepResult = self._clock.timed("result", lambda: StepResult(*self._sampled.result()))
        return result


class ScriptedExecutor:
    """The host's work for a replayed step, as `Runner` and `DecodeGraphs` do it; tokens are random, and none is EOS."""

    def __init__(self, limits: GraphLimits, clock: Clock) -> None:
        device = torch.device("cpu")
        self._clock, self._limits = clock, limits
        self._inputs = InputBuilder(limits.num_pages, limits.page_size, device)
        self._static = StaticInputs(limits, device)
        self._tokens = torch.randint(3, VOCAB_SIZE, (limits.max_num_seqs,), generator=torch.Generator().manual_seed(0))
        self._last: LastSampled | None = None

    def begin(self, step: Step) -> ScriptedStep:
        """All but the replay."""
        clock = self._clock
        host = clock.timed("build_on_host", lambda: self._inputs.build_on_host(step, self._last))
        if len(host.q_lens) == len(host.token_ids) <= self._limits.max_num_seqs:
            clock.timed("write", lambda: self._static.write(host, len(host.q_lens)))
            clock.timed("parameters", lambda: self._write_parameters(step))
        sampled = clock.timed("result", lambda: Sampled(self._tokens[: len(step.sampling)], step.sampling))
        self._last = clock.timed("build_on_host", lambda: self._last_sampled(step, sampled))
        return ScriptedStep(sampled, clock)

    def _write_parameters(self, step: Step) -> None:
        assert self._static.write_parameters(step), "sampling is all that is asked"

    def _last_sampled(self, step: Step, sampled: Sampled) -> LastSampled:
        return LastSampled(step.sampling, sampled.token_ids)


def make_engine(num_sequences: int) -> Engine:
    """An engine that has room for so many sequences and overlaps steps."""
    num_pages = (num_sequences + 8) * MAX_MODEL_LEN // PAGE_SIZE
    limits = SchedulerLimits(num_sequences, 8192, MAX_MODEL_LEN, PAGE_SIZE)
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
        8192,
        [],
    )
    scheduler = TimedScheduler(limits, PagePool(num_pages), {EOS})
    scheduler.clock = Clock()
    executor = ScriptedExecutor(GraphLimits(num_sequences, MAX_MODEL_LEN, PAGE_SIZE, num_pages), scheduler.clock)
    engine = Engine(executor, scheduler, info, overlap=True)
    return engine


def measure(num_sequences: int, kind: str, num_steps: int, turnover: int) -> dict[str, float]:
    """Microseconds of each part of a step, and of all of it: medians, means where sequences come and go.

    turnover  after so many steps a sequence ends and another takes its place; 0: never
    """
    engine, source = make_engine(num_sequences), random.Random(0)
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
            clock.spent.clear()
            started = time.perf_counter_ns()
            outputs = engine.step()
            whole = (time.perf_counter_ns() - started) / 1000
            if number >= 32:
                rows.append({**{part: clock.spent[part] for part in PARTS}, "step": whole})
            for output in outputs:
                if output.finish_reason:
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
    options = parser.parse_args()
    torch.set_num_threads(1)  # what stands for copies to a device is to wait for nobody
    names = [*PARTS, "step", "a sequence"]
    print(f"| sequences | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
    for kind in options.kinds:
        for count in options.sequences:
            found = measure(count, kind, options.steps, options.turnover)
            found["a sequence"] = found["step"] / count
            print(f"| {count} {kind} | {' | '.join(f'{found[name]:,.1f}' for name in names)} |", flush=True)
            if options.json:
                about = {
                    "sequences": count,
                    "kind": kind,
                    "turnover": options.turnover,
                    "python": platform.python_version(),
                }
                with options.json.open("a") as file:
                    file.write(json.dumps(about | found) + "\n")


if __name__ == "__main__":
    main()
