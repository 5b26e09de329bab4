"""First-token latency in four bars: network, a simple kernel, fast kernels, and those with a warm prefix cache."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tessera.bench.api.load import cached_tokens, round_trips_ms
from tessera.bench.benchmark import Done
from tessera.bench.provenance import Provenance, provenance
from tessera.bench.record import OF_ENGINE, Conditions, Kind, Record, Subject, Value
from tessera.bench.served.client_process import Job
from tessera.bench.served.latency import client_figures, failures, ttft_ms, wrong_lengths
from tessera.bench.served.load import Call, Load
from tessera.bench.served.processes import measure
from tessera.bench.served.prompts import Prompts, prompts_for
from tessera.bench.served.rows import device_type
from tessera.bench.served.servers import Server
from tessera.bench.served.turns import records_in_turns
from tessera.bench.ttft.bars import NETWORK_PATH, Bar, Model, Stage, cache_problem
from tessera.bench.ttft.options import TtftOptions

FIELDS = {"temperature": 0, "ignore_eos": True}


@dataclass(frozen=True)
class _Running:
    """A server that is up."""

    server: Server
    model: str
    subject: Subject
    conditions: Conditions
    prompts: Prompts


@dataclass(frozen=True)
class Cell:
    """A bar for prompts of one length."""

    bar: Bar
    num_tokens: int


class TtftBenchmark:
    """Every bar of every model with every length of prompt, `options.repeats` times.

    A server is started for each repeat and each setting that its bars need (the network and the naive bar share one);
    they take turns as served/turns.py says, and the bars of one model are one group. A row is the median of
    `options.requests` requests for one token, one after another on one connection; one more, before the clock, warms
    up. Prompts are new each time, but for the bar with the warm cache, whose prompt is the warm-up's; a row of it in
    which a prompt was not found in the cache is failed, and so is one of another in which one was.
    """

    kind: Kind = "ttft"

    def __init__(
        self, models: Sequence[Model], options: TtftOptions, *, seed: int = 0, command: str | None = None
    ) -> None:
        self.models, self.options = models, options
        self._seed, self._command = seed, command
        self._provenance: Provenance | None = None

    @property
    def num_records(self) -> int:
        """One a model, bar, length and repeat."""
        num_bars = sum(len(stage.bars) for model in self.models for stage in model.stages)
        return num_bars * len(self.options.lengths) * self.options.repeats

    def records(self, done: Container[Done] = ()) -> Iterator[Record]:
        """Measure and yield row by row."""
        self._provenance = self._provenance or provenance(self._command)
        yield from records_in_turns(self, [model.stages for model in self.models], self.options.repeats, done)

    def cells(self, stage: Stage) -> Sequence[Cell]:
        """Every length at every bar of a server."""
        return [Cell(bar, num_tokens) for num_tokens in self.options.lengths for bar in stage.bars]

    def blank(self, stage: Stage, repeat: int, cell: Cell, reason: str) -> Record:
        """A row without figures, of a server of which nothing is known."""
        conditions = Conditions(model=stage.model, seed=self._seed, settings=self._settings())
        subject = Subject(cell.bar.label, asked={} if cell.bar.is_network else stage.target.wanted.asked)
        case = _case(stage, cell)
        return Record(self.kind, case, subject, "failed", conditions, self._where, repeat, reason=reason)

    def ready(self, stage: Stage, repeat: int, server: Server, subject: Subject) -> Callable[[Cell], Record]:
        """What measures a bar at this server."""
        return partial(self._measured, self._prepared(server, subject), stage, repeat)

    @property
    def _where(self) -> Provenance:
        assert self._provenance
        return self._provenance

    def _settings(self) -> dict[str, Value]:
        return FIELDS | {
            "max_tokens": 1,
            "requests": self.options.requests,
            "timeout_s": self.options.request_timeout,
            "order": "servers and lengths reversed every second repeat",
        }

    def _prepared(self, server: Server, subject: Subject) -> _Running:
        model, info, settings = server.model, server.info, self._settings()
        assert info  # ours tell
        settings |= {name: getattr(info, name) for name in OF_ENGINE}
        conditions = Conditions(model, info.dtype, device_type(info), self._seed, settings=settings)
        return _Running(server, model, subject, conditions, asyncio.run(prompts_for(server, model)))

    def _measured(self, running: _Running, stage: Stage, repeat: int, cell: Cell) -> Record:
        bar = cell.bar
        conditions = replace(
            running.conditions,
            cache="warm" if bar.is_warm else "off",
            warmup="1 request of the same prompt"
            if bar.is_warm
            else f"1 request of {'its' if bar.is_network else 'the'} kind",
        )
        subject = bar.subject(running.subject)
        row = Record(self.kind, _case(stage, cell), subject, "failed", conditions, self._where, repeat, reason="-")
        if bar.is_network:
            times = asyncio.run(round_trips_ms(running.server, NETWORK_PATH, self.options.requests))
            return _with(row, times, {})
        load = self._send(running, cell, (stage.model, bar.label, repeat))
        replies = load.replies[1:]
        asked = [cell.num_tokens] * len(replies)
        if problem := failures(load) or wrong_lengths(replies, asked) or cache_problem(bar, replies):
            return replace(row, reason=problem)
        figures = {
            "cached_prompt_tokens": float(cached_tokens(replies) or 0),
        } | client_figures(load)
        return _with(row, [ttft_ms(reply) for reply in replies], figures | running.server.memory())

    def _send(self, running: _Running, cell: Cell, salt: Sequence[object]) -> Load:
        """The request that warms up, then those that are timed; `salt` tells its prompts from those of other rows."""

        def call(index: int) -> Call:
            place = "same" if cell.bar.is_warm else index
            return running.prompts.call(index, cell.num_tokens, 1, dict(FIELDS), self._seed, *salt, place)

        calls = [call(index) for index in range(self.options.requests + 1)]
        server, timeout = running.server, self.options.request_timeout
        return measure(Job(server.url, running.model, calls, timeout, 1, server.headers), 1, server.dialect)


def _case(stage: Stage, cell: Cell) -> dict[str, Value]:
    """As a Record has it: the bars of one are compared with one another."""
    return {"model": stage.model, "prompt_tokens": cell.num_tokens}


def _with(row: Record, times_ms: Sequence[float], figures: dict[str, float]) -> Record:
    """The row with its times; failed where a proof does not fit, without which there is no figure."""
    metrics, samples = {"ttft_ms": statistics.median(times_ms)} | figures, [round(value, 4) for value in times_ms]
    try:
        return replace(row, status="ok", reason="", metrics=metrics, samples={"ttft_ms": samples})
    except ValueError as error:
        return replace(row, reason=str(error))
