"""Replays of a trace against servers, whatever the servers do: latency and throughput as a user of each sees them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace

from tessera.bench.benchmark import Done
from tessera.bench.online.trace import Trace
from tessera.bench.online.trace_prompts import Vocabulary, calls_of, warmup_calls
from tessera.bench.provenance import Provenance, provenance
from tessera.bench.record import Conditions, Kind, Record, Value
from tessera.bench.served.client import Load, closed_loop, open_loop
from tessera.bench.served.latency import (
    Promise,
    bottleneck,
    due_ttft_ms,
    failures,
    goodput,
    samples,
    summary,
    throughput,
    wrong_lengths,
)
from tessera.bench.served.rows import device_type
from tessera.bench.served.servers import Server
from tessera.bench.served.targets import OwnTarget, Target, UrlTarget
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

    def case_of(self, scale: float) -> dict[str, Value]:
        """As a Record has it."""
        name = self.trace.name if self.case else f"{self.trace.name} ({self.trace.digest})"
        return {"trace": name, "scale": scale, "num_requests": len(self.trace.arrivals), **self.case}


class OnlineBenchmark:
    """Every target under every scale, `repeats` times.

    A server is alone on the machine: ours are started for a repeat and stopped after it. Every second repeat takes
    targets and scales in reverse order, so that none always comes first. All targets get the very same calls; the
    prompts of each scale and repeat are new, so that no replay profits from what another left in a prefix cache; where
    a server stays up, those of each run too. What is compared was measured in one run: a scale that `done` has for some
    targets only is measured for all.
    """

    kind: Kind = "online"

    def __init__(self, targets: Sequence[Target], replay: Replay, *, repeats: int, command: str | None = None) -> None:
        labels = [target.label for target in targets]
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise ConfigError(
                f"{sorted(twice)[0]} is named twice", "give each server a name of its own: --url NAME=URL"
            )
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
        for repeat in range(self.repeats):
            step = -1 if repeat % 2 else 1
            left = {
                target.label: [s for s in self.replay.scales if not self._is_done(target, repeat, s, done)]
                for target in self.targets
            }
            of_any = [scale for target in self.targets if not target.reasons for scale in left[target.label]]
            for target in self.targets[::step]:
                wanted = left[target.label] if target.reasons else of_any
                if scales := [scale for scale in self.replay.scales[::step] if scale in wanted]:
                    yield from self._of(target, repeat, scales)

    def _is_done(self, target: Target, repeat: int, scale: float, done: Container[Done]) -> bool:
        return Done(self._row(target, repeat, scale, "left out").case_key, target.label, repeat) in done

    def _of(self, target: Target, repeat: int, scales: Sequence[float]) -> Iterator[Record]:
        """The rows of one target in one repeat."""
        if target.reasons:
            for scale in scales:
                row = self._row(target, repeat, scale, "; ".join(target.reasons))
                yield replace(row, status="unavailable")
            return
        left = list(scales)
        try:
            server, subject = target.start()
            with server:
                model, conditions = server.model, self._conditions(target, server)
                self._warm_up(server, model, repeat)
                while left:
                    load = self._load(server, model, repeat, left[0])
                    row = Record(
                        self.kind,
                        self.replay.case_of(left[0]),
                        subject,
                        "failed",
                        conditions,
                        self._where,
                        repeat,
                        reason="-",
                    )
                    yield self._judged(row, load, server)
                    left.pop(0)
        except TesseraError as error:
            for scale in left:
                yield self._row(target, repeat, scale, str(error).replace("\n\n", " "))

    @property
    def _where(self) -> Provenance:
        assert self._provenance
        return self._provenance

    def _row(self, target: Target, repeat: int, scale: float, reason: str) -> Record:
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
            "trace_digest": replay.trace.digest,
            "slo_ttft_ms": replay.promise.ttft_ms,
            "slo_tpot_ms": replay.promise.tpot_ms,
            "timeout_s": replay.timeout_s,
            "prompt_salt": self._run_salt,
            "order": "targets and scales reversed every second repeat",
            "server": f"started for each repeat: {' '.join(target.flags)}"
            if isinstance(target, OwnTarget)
            else "external",
        }

    def _conditions(self, target: Target, server: Server) -> Conditions:
        info, settings = server.info, self._settings(target)
        if info and self.replay.trace.longest > info.max_model_len:
            longest = self.replay.trace.longest
            raise TesseraError(
                f"the trace's longest request has {longest} tokens, the server takes {info.max_model_len}",
                "raise --max-model-len, or take a trace with shorter requests",
            )
        if info:
            names = ("page_size", "num_pages", "max_num_seqs", "max_num_batched_tokens", "max_model_len")
            settings |= {name: getattr(info, name) for name in names}
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
        calls = warmup_calls(replay.trace, replay.vocabulary, replay.num_warmup, salt=self._salt(repeat, 0))
        if not calls:
            return
        load = asyncio.run(
            closed_loop(
                server.url,
                model,
                calls,
                len(calls),
                timeout_s=replay.timeout_s,
                headers=server.headers,
                dialect=server.dialect,
            )
        )
        if load.failed:
            raise TesseraError(f"in the warm-up {failures(load)}", "see the server's log")

    def _load(self, server: Server, model: str, repeat: int, scale: float) -> Load:
        replay = self.replay
        calls = calls_of(replay.trace, replay.vocabulary, scale=scale, salt=self._salt(repeat, scale))
        headers, dialect = server.headers, server.dialect
        loop = open_loop(server.url, model, calls, timeout_s=replay.timeout_s, headers=headers, dialect=dialect)
        return asyncio.run(loop)

    def _judged(self, row: Record, load: Load, server: Server) -> Record:
        """The row with the load's figures, or with the reasons of those of its requests that failed."""
        notes = [row.subject.note] if row.subject.note else []
        if warning := bottleneck(load):
            logger.warning("%s at scale %s: %s", row.subject.label, row.case["scale"], warning)
            notes.append(warning)
        if any(reply.token_counts == "spread" for reply in load.replies if reply.ok):
            notes.append("tokens spread over chunks: the server does not tell the tokens of each")
        if problem := failures(load) or self._wrong_lengths(load):
            return replace(row, subject=replace(row.subject, note="; ".join(notes)), reason=problem)
        rounded = {name: [round(value, 4) for value in values] for name, values in samples(load).items()}
        figures = metrics(load, self.replay.promise) | server.memory()
        if figures.get("cached_prompt_share", 0) > (share := self.replay.trace.shared_share) + 0.01:
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


def metrics(load: Load, promise: Promise) -> dict[str, float]:
    """Every figure of a load in which nothing failed: ValueError where something did."""
    found: dict[str, float] = {}
    for name, values in samples(load).items():
        found |= summary(name, values)
    found |= summary("due_ttft_ms", [due_ttft_ms(reply) for reply in load.replies])
    found |= throughput(load) | goodput(load, promise)
    found |= {"client_cpu": load.client_cpu, "client_lag_ms": 1000 * load.lag_s, "seconds": load.seconds}
    found |= {"num_failed": float(len(load.failed))}
    cached = [reply.cached_tokens for reply in load.replies]
    prompt = sum(reply.prompt_tokens for reply in load.replies)
    if prompt and all(tokens is not None for tokens in cached):
        found["cached_prompt_share"] = sum(tokens or 0 for tokens in cached) / prompt
    return found
