"""Replays of a trace against servers, whatever the servers do: latency and throughput as a user of each sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tessera.bench.benchmark import Done
from tessera.bench.online.trace import Trace
from tessera.bench.online.trace_prompts import Vocabulary, calls_of, warmup_calls
from tessera.bench.provenance import Provenance, provenance
from tessera.bench.record import OF_ENGINE, Conditions, Kind, Record, Subject, Value
from tessera.bench.served.client_process import Job
from tessera.bench.served.latency import (
    Promise,
    bottleneck,
    client_figures,
    due_ttft_ms,
    failures,
    goodput,
    samples,
    summary,
    throughput,
    wrong_lengths,
)
from tessera.bench.served.load import Call, Load
from tessera.bench.served.processes import check_processes, measure, num_processes
from tessera.bench.served.rows import device_type
from tessera.bench.served.servers import Server
from tessera.bench.served.targets import OwnTarget, Target, UrlTarget, check_names
from tessera.bench.served.turns import records_in_turns
from tessera.errors import ConfigError, TesseraError
from tessera.log import logger


@dataclass(frozen=True)
class Replay:
    """What is replayed, the same for every server."""

    trace: Trace
    scales: Sequence[float]
    vocabulary: Vocabulary
    case: dict[str, Value]
    """What tells the trace from others of its name."""
    seed: int = 0
    num_warmup: int = 4
    promise: Promise = Promise(1000.0, 100.0)  # noqa: RUF009 - frozen
    timeout_s: float = 600.0
    messages: bool = False
    """To the chat endpoint; `vocabulary` must be of words."""
    keep_servers: bool = False
    """Whether our own servers stay up from their first repeat to the end."""
    concurrency: int | None = None
    """Streams kept in flight, whatever the arrivals; None: each is sent when it is due."""
    client_processes: int = 0
    """That send the load together; 0: as many as it and this machine's cores ask for.

    ConfigError for too many of these or of streams.
    """

    def __post_init__(self) -> None:
        number = len(self.trace.arrivals)
        check_processes(self.client_processes, number, "requests of the trace")
        if self.concurrency is not None and self.concurrency > number:
            raise ConfigError(
                f"--concurrency {self.concurrency} is more than the {number} requests of the trace",
                f"use {number} at most, or more --num-requests",
            )

    def case_of(self, scale: float) -> dict[str, Value]:
        """As a Record has it."""
        name = self.trace.name if "input_len" in self.case else f"{self.trace.name} ({self.trace.digest})"
        load: dict[str, Value] = {"scale": scale} if self.concurrency is None else {"concurrency": self.concurrency}
        return {"trace": name, **load, "num_requests": len(self.trace.arrivals), **self.case}


class OnlineBenchmark:
    """Every target under every scale, `repeats` times.

    They take turns as served/turns.py says. All targets get the very same calls; the prompts of each scale and repeat
    are new, so that no replay profits from what another left in a prefix cache; where a server stays up, those of each
    run too.
    """

    kind: Kind = "online"

    def __init__(self, targets: Sequence[Target], replay: Replay, *, repeats: int, command: str | None = None) -> None:
        check_names(targets)
        self.targets, self.replay, self.repeats = targets, replay, repeats
        self._command = command
        self._provenance: Provenance | None = None

    @property
    def num_records(self) -> int:
        """One a target, scale and repeat."""
        return len(self.targets) * len(self.replay.scales) * self.repeats

    def records(self, done: Container[Done] = ()) -> Iterator[Record]:
        """Replay and yield row by row."""
        self._provenance = self._provenance or provenance(self._command)
        keep = self.replay.keep_servers
        yield from records_in_turns(self, [self.targets], self.repeats, done, keep_servers=keep)

    def cells(self, _target: Target) -> Sequence[float]:
        """Scales, the same for every target."""
        return self.replay.scales

    def ready(self, target: Target, repeat: int, server: Server, subject: Subject) -> Callable[[float], Record]:
        """Warm up; what replays a scale."""
        model, conditions = server.model, self._conditions(target, server)
        self._warm_up(server, model, repeat)

        def replayed(scale: float) -> Record:
            load = self._load(server, model, repeat, scale)
            case = self.replay.case_of(scale)
            row = Record(self.kind, case, subject, "failed", conditions, self._where, repeat, reason="-")
            return self._judged(row, load, server)

        return replayed

    @property
    def _where(self) -> Provenance:
        assert self._provenance
        return self._provenance

    def blank(self, target: Target, repeat: int, scale: float, reason: str) -> Record:
        """A row without figures."""
        conditions = Conditions(seed=self.replay.seed, settings=self._settings(target))
        case = self.replay.case_of(scale)
        return Record(self.kind, case, target.idle, "failed", conditions, self._where, repeat, reason=reason)

    def _settings(self, target: Target) -> dict[str, Value]:
        replay = self.replay
        return {
            "temperature": 0,
            "ignore_eos": True,
            "prompts": "text" if replay.vocabulary.is_text else "token ids",
            "endpoint": "chat" if replay.messages else "completions",
            "trace_digest": replay.trace.digest,
            "slo_ttft_ms": replay.promise.ttft_ms,
            "slo_tpot_ms": replay.promise.tpot_ms,
            "timeout_s": replay.timeout_s,
            "client_processes": replay.client_processes or "by load and cores",
            "prompt_salt": self._run_salt,
            "order": "targets and scales reversed every second repeat",
            "server": self._server_of(target),
        }

    def _server_of(self, target: Target) -> str:
        if not isinstance(target, OwnTarget):
            return "external"
        how = "kept up beside the others" if self.replay.keep_servers else "started for each repeat"
        return f"{how}: {' '.join(target.flags)}"

    def _conditions(self, target: Target, server: Server) -> Conditions:
        info, settings = server.info, self._settings(target)
        if info and self.replay.trace.longest > info.max_model_len:
            longest = self.replay.trace.longest
            raise TesseraError(
                f"the trace's longest request has {longest} tokens, the server takes {info.max_model_len}",
                "raise --max-model-len, or take a trace with shorter requests",
            )
        if info:
            settings |= {name: getattr(info, name) for name in OF_ENGINE}
        return Conditions(
            model=info.model if info else server.model,
            dtype=info.dtype if info else "",
            device=device_type(info),
            seed=self.replay.seed,
            warmup=f"{self.replay.num_warmup} requests at once, prompts of their own, once after each start",
            cache=target.cache,
            settings=settings,
        )

    @property
    def _run_salt(self) -> str:
        """What tells this run's prompts from those that a server which stays up was sent before; '' for ours."""
        return self._where.run if any(isinstance(target, UrlTarget) for target in self.targets) else ""

    def _salt(self, repeat: int, scale: float) -> tuple[int, ...]:
        of_run = int.from_bytes(hashlib.sha256(self._run_salt.encode()).digest()[:8])
        return (self.replay.seed, repeat, round(scale * 1e6), *([of_run] if self._run_salt else []))

    def _warm_up(self, server: Server, model: str, repeat: int) -> None:
        replay = self.replay
        salt = self._salt(repeat, 0)
        calls = warmup_calls(replay.trace, replay.vocabulary, replay.num_warmup, salt=salt, messages=replay.messages)
        if not calls:
            return
        load = measure(self._job(server, model, calls, len(calls)), 1, server.dialect)
        if load.failed:
            raise TesseraError(f"in the warm-up {failures(load)}", "see the server's log")

    def _load(self, server: Server, model: str, repeat: int, scale: float) -> Load:
        replay = self.replay
        salt = self._salt(repeat, scale)
        calls = calls_of(replay.trace, replay.vocabulary, scale=scale, salt=salt, messages=replay.messages)
        processes = num_processes(replay.client_processes, calls, replay.concurrency)
        return measure(self._job(server, model, calls, replay.concurrency), processes, server.dialect)

    def _job(self, server: Server, model: str, calls: list[Call], concurrency: int | None) -> Job:
        return Job(server.url, model, calls, self.replay.timeout_s, concurrency, server.headers)

    def _judged(self, row: Record, load: Load, server: Server) -> Record:
        """The row with the load's figures, or with the reasons of those of its requests that failed."""
        notes = [row.subject.note] if row.subject.note else []
        if warning := bottleneck(load):
            logger.warning("%s at %s: %s", row.subject.label, load_text(row.case), warning)
            notes.append(warning)
        if any(reply.token_counts == "spread" for reply in load.replies if reply.ok):
            notes.append("tokens spread over chunks: the server does not tell the tokens of each")
        if problem := failures(load) or self._wrong_lengths(load):
            return replace(row, subject=replace(row.subject, note="; ".join(notes)), reason=problem)
        rounded = {name: [round(value, 4) for value in values] for name, values in samples(load).items()}
        figures = metrics(load, self.replay.promise) | server.memory()
        share = self.replay.trace.shared_share
        # A chat template's beginning is the same in all prompts, and how long it is only the server knows.
        if figures.get("cached_prompt_share", 0) > share + 0.01 and not self.replay.messages:
            found = (
                f"{figures['cached_prompt_share']:.0%} of the prompts were found in it, the trace shares {share:.0%}"
            )
            notes.append(f"the prefix cache was warm: {found}")
        subject = replace(row.subject, note="; ".join(notes))
        try:
            return replace(row, subject=subject, status="ok", reason="", metrics=figures, samples=rounded)
        except ValueError as error:  # without a proof that fits there is no figure
            return replace(row, subject=subject, reason=str(error))

    def _wrong_lengths(self, load: Load) -> str:
        """Which prompts of token ids the server counted otherwise; of texts nobody knows how many they are."""
        if self.replay.vocabulary.is_text:
            return ""
        return wrong_lengths(load.replies, [arrival.input_tokens for arrival in self.replay.trace.arrivals])


def load_text(case: Mapping[str, Value]) -> str:
    """`scale 0.4` or `256 streams`: the load of a case, for people."""
    return f"{case['concurrency']} streams" if "concurrency" in case else f"scale {case['scale']}"


def metrics(load: Load, promise: Promise) -> dict[str, float]:
    """Every figure of a load in which nothing failed: ValueError where something did."""
    found: dict[str, float] = {}
    for name, values in samples(load).items():
        found |= summary(name, values)
    found |= summary("due_ttft_ms", [due_ttft_ms(reply) for reply in load.replies])
    found |= throughput(load) | goodput(load, promise)
    found |= client_figures(load) | {"seconds": load.seconds, "num_failed": float(len(load.failed))}
    cached = [reply.cached_tokens for reply in load.replies]
    prompt = sum(reply.prompt_tokens for reply in load.replies)
    if prompt and all(tokens is not None for tokens in cached):
        found["cached_prompt_share"] = sum(tokens or 0 for tokens in cached) / prompt
    return found
