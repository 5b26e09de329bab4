"""The sweep of the FlashAttention article: throughput and first tokens over concurrency, for short and long prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tessera.bench.api.load import (
    NUM_PROBES,
    cache_state,
    cached_tokens,
    hits,
    metrics,
    network_ms,
)
from tessera.bench.api.options import ApiOptions
from tessera.bench.benchmark import Done
from tessera.bench.provenance import Provenance, provenance
from tessera.bench.record import OF_ENGINE, Conditions, Kind, Record, Subject, Value
from tessera.bench.served.client_process import Job
from tessera.bench.served.latency import bottleneck, failures, ttft_ms, wrong_lengths
from tessera.bench.served.load import Call, Load
from tessera.bench.served.processes import measure, num_processes
from tessera.bench.served.prompts import Prompts, prompts_for
from tessera.bench.served.rows import device_type
from tessera.bench.served.servers import Server
from tessera.bench.served.targets import Target, UrlTarget, check_names
from tessera.bench.served.turns import records_in_turns
from tessera.log import logger

NUM_WARMUP_TOKENS = 8


@dataclass(frozen=True)
class Cell:
    """One place of the grid."""

    concurrency: int
    num_tokens: int
    """Of each prompt."""


@dataclass(frozen=True)
class _Running:
    """A server that is up, and what all its rows share."""

    server: Server
    model: str
    subject: Subject
    conditions: Conditions
    prompts: Prompts
    network_ms: float
    caching_off: bool


class ApiBenchmark:
    """Every target at every level of concurrency with every length of prompt, `repeats` times.

    They take turns as served/turns.py says. All targets get the same prompts; those of each row are new, so that none
    profits from what another left in a prefix cache, unless `options.same_prompt`. A row in which a request
    failed, was counted otherwise than asked, or hit the cache though its prompt was new, is failed.
    """

    kind: Kind = "api"

    def __init__(
        self,
        targets: Sequence[Target],
        options: ApiOptions,
        *,
        model: str,
        repeats: int,
        seed: int = 0,
        command: str | None = None,
    ) -> None:
        check_names(targets)
        self.targets, self.options, self.repeats = targets, options, repeats
        self._cells = [Cell(level, length) for length in options.lengths for level in options.levels]
        self._model, self._seed, self._command = model, seed, command
        self._provenance: Provenance | None = None

    @property
    def num_records(self) -> int:
        """One a target, level, length and repeat."""
        return len(self.targets) * len(self._cells) * self.repeats

    def case_of(self, cell: Cell) -> dict[str, Value]:
        """As a Record has it; the model too, so that those of different models are never compared."""
        options = self.options
        return {
            "model": self._model,
            "input_tokens": cell.num_tokens,
            "output_tokens": options.output_len,
            "concurrency": cell.concurrency,
            "prompts": "same" if options.same_prompt else "distinct",
            "endpoint": "chat" if options.chat else "completions",
        }

    def records(self, done: Container[Done] = ()) -> Iterator[Record]:
        """Measure and yield row by row."""
        self._provenance = self._provenance or provenance(self._command)
        keep = self.options.keep_servers
        yield from records_in_turns(self, [self.targets], self.repeats, done, keep_servers=keep)

    def cells(self, _target: Target) -> Sequence[Cell]:
        """The same for every target: every length at every level."""
        return self._cells

    def blank(self, target: Target, repeat: int, cell: Cell, reason: str) -> Record:
        """A row without figures of a target of which nothing is known."""
        conditions = Conditions(model=self._model, seed=self._seed, settings=self._settings())
        case = self.case_of(cell)
        return Record(self.kind, case, target.idle, "failed", conditions, self._where, repeat, reason=reason)

    @property
    def _where(self) -> Provenance:
        assert self._provenance
        return self._provenance

    @property
    def _salt(self) -> str:
        """What tells this run's prompts from those that a server which stays up was sent before; '' for ours."""
        return self._where.run if any(isinstance(target, UrlTarget) for target in self.targets) else ""

    def _settings(self) -> dict[str, Value]:
        options = self.options
        return {
            "temperature": 0,
            "ignore_eos": options.ignore_eos,
            "prompts": "same" if options.same_prompt else "distinct",
            "prompt_salt": self._salt,
            "timeout_s": options.request_timeout,
            "client_processes": options.client_processes or "by load and cores",
            "order": "targets and levels reversed every second repeat",
            "server": "kept up beside the others" if options.keep_servers else "started for each repeat",
        }

    def ready(self, target: Target, repeat: int, server: Server, subject: Subject) -> Callable[[Cell], Record]:
        """What measures a level at this server."""
        return partial(self._measured, self._prepared(target, server, subject), repeat)

    def _prepared(self, target: Target, server: Server, subject: Subject) -> _Running:
        model, info, settings = server.model, server.info, self._settings()
        if info:
            self.options.check_context(info.max_model_len, info.model)
            settings |= {name: getattr(info, name) for name in OF_ENGINE}
        prompts = asyncio.run(prompts_for(server, model, messages=self.options.chat))
        settings |= {"prompt_form": "token ids" if isinstance(prompts.parts[0], int) else "text"}
        conditions = Conditions(
            model=model,
            dtype=info.dtype if info else "",
            device=device_type(info),
            seed=self._seed,
            warmup=f"before each row as many requests at once as it has, for {NUM_WARMUP_TOKENS} tokens at most, of "
            + ("its prompt" if self.options.same_prompt else "prompts of their own"),
            settings=settings,
        )
        return _Running(server, model, subject, conditions, prompts, network_ms(server), target.cache == "off")

    def _measured(self, running: _Running, repeat: int, cell: Cell) -> Record:
        row = Record(
            self.kind,
            self.case_of(cell),
            running.subject,
            "failed",
            running.conditions,
            self._where,
            repeat,
            reason="not measured",
        )
        if problem := failures(self._send(running, self._warmup_calls(running, repeat, cell), 1)):
            return replace(row, reason=f"in the warm-up {problem}")
        calls = [self._call(running, repeat, cell, index) for index in range(cell.concurrency)]
        load = self._send(running, calls, num_processes(self.options.client_processes, calls, len(calls)))
        return self._judged(row, running, cell, load)

    def _call(self, running: _Running, repeat: int, cell: Cell, index: int) -> Call:
        place = "same" if self.options.same_prompt else index
        salt = (self._salt, self._seed, repeat, cell.concurrency, place)
        return running.prompts.call(index, cell.num_tokens, self.options.output_len, self._fields, *salt)

    def _warmup_calls(self, running: _Running, repeat: int, cell: Cell) -> list[Call]:
        """As many as the row has: of its prompt where all are the same, else of prompts of their own."""
        calls = [self._call(running, repeat, cell, -1 - index) for index in range(cell.concurrency)]
        return [replace(call, max_tokens=min(NUM_WARMUP_TOKENS, call.max_tokens)) for call in calls]

    @property
    def _fields(self) -> dict[str, Value]:
        fields: dict[str, Value] = {"temperature": 0}
        return fields | {"ignore_eos": True} if self.options.ignore_eos else fields

    def _send(self, running: _Running, calls: list[Call], processes: int) -> Load:
        """All at once."""
        server, timeout = running.server, self.options.request_timeout
        job = Job(server.url, running.model, calls, timeout, len(calls), server.headers)
        return measure(job, processes, server.dialect)

    def _judged(self, row: Record, running: _Running, cell: Cell, load: Load) -> Record:
        """The row with the load's figures, or with what forbids them."""
        subject = replace(row.subject, note="; ".join(note for note in (row.subject.note, _caveats(load)) if note))
        if warning := bottleneck(load, has_gaps=False):
            logger.warning("%s at concurrency %d: %s", subject.label, cell.concurrency, warning)
        added = running.prompts.num_added
        cache = cache_state(load.replies, added, is_off=running.caching_off)
        row = replace(row, subject=subject, conditions=replace(row.conditions, cache=cache))
        if problem := self._problem(load, cell, added):
            return replace(row, reason=problem)
        figures = metrics(load) | {"network_ms": running.network_ms} | running.server.memory()
        if (cached := cached_tokens(load.replies)) is not None:
            figures["cached_prompt_tokens"] = float(cached)
        firsts = [round(ttft_ms(reply), 4) for reply in load.replies]
        try:
            return replace(row, status="ok", reason="", metrics=figures, samples={"ttft_ms": firsts})
        except ValueError as error:  # without a proof that fits there is no figure
            return replace(row, reason=str(error))

    def _problem(self, load: Load, cell: Cell, num_added: int) -> str:
        """Why this load must not be a figure, or ''."""
        if load.failed:
            return failures(load)
        if wrong := wrong_lengths(load.replies, [cell.num_tokens] * len(load.replies)):
            return wrong
        if not self.options.same_prompt and (num_hits := hits(load.replies, num_added)):
            return (
                f"{num_hits} of {len(load.replies)} prompts came out of the prefix cache, though none was sent before"
            )
        return ""


def _caveats(load: Load) -> str:
    spread = any(reply.token_counts == "spread" for reply in load.replies if reply.ok)
    told = "tokens spread over chunks: the server does not tell the tokens of each" if spread else ""
    return "; ".join(note for note in (bottleneck(load, has_gaps=False), told) if note)


PROBES = f"median of {NUM_PROBES} GETs to the server's root"
"""How `network_ms` is measured, for captions."""
