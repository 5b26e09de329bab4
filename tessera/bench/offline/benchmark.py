"""Throughput on fixed token ids: each backend and each peer in a process of its own, taking turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from tessera.bench.benchmark import Done
from tessera.bench.offline.entrants import Entrant, ours, peers
from tessera.bench.offline.options import OfflineOptions
from tessera.bench.offline.racer import Racer, close_all
from tessera.bench.offline.target import Target, target_of
from tessera.bench.offline.worker_process import WorkerError, WorkerProcess
from tessera.bench.offline.workloads import Work, works_of
from tessera.bench.provenance import Provenance
from tessera.bench.record import OF_ENGINE, CacheState, Conditions, Kind, Record, Status, Subject, Value
from tessera.bench.statistics import percentile
from tessera.bench.subjects import Wanted
from tessera.config import EngineConfig, LoadFormat
from tessera.errors import TesseraError
from tessera.log import logger


class OfflineBenchmark:
    """Runs each workload on every subject, `repeats` times, in the order A B C, C B A, ...

    A subject is started once for all workloads. What is compared was measured side by side: a repeat that `done` has
    for some subjects only is measured for all.
    Raises ConfigError where the workload does not fit the model, or for an impossible option.
    """

    kind: Kind = "offline"

    def __init__(
        self,
        config: EngineConfig,
        wanted: Sequence[Wanted],
        options: OfflineOptions,
        repeats: int,
        provenance: Provenance,
    ) -> None:
        self._works: list[Work] = works_of(options)
        self.target: Target = target_of(config)
        self.config = self._fitted(config)
        self._options, self._repeats, self._provenance = options, repeats, provenance
        self._order = "one at a time" if options.one_at_a_time else "in turns"
        self._entrants = [ours(each, self.config) for each in wanted] + peers(options, self.target, self.config)

    @property
    def cases(self) -> list[dict[str, Value]]:
        """One a workload."""
        return [self._case(work) for work in self._works]

    def _case(self, work: Work) -> dict[str, Value]:
        return {
            **work.workload.case,
            "temperature": self._options.temperature,
            "model": self.target.name,
            "dtype": self.target.dtype,
        }

    @property
    def num_records(self) -> int:
        """Of each workload: one for each that cannot take part, one a repeat for the others."""
        return len(self._works) * sum(1 if entrant.reasons else self._repeats for entrant in self._entrants)

    @property
    def labels(self) -> list[str]:
        """All subjects, in the order in which they were named."""
        return [entrant.subject.label for entrant in self._entrants]

    def records(self, done: Container[Done] = ()) -> Iterator[Record]:
        """Rows in the order in which they were measured; see Benchmark."""
        for entrant, work in product(self._entrants, self._works):
            if entrant.reasons and not self._is_done(entrant, work, 0, done):
                yield self._row(entrant.subject, work, "unavailable", 0, reason="; ".join(entrant.reasons))
        able = [entrant for entrant in self._entrants if not entrant.reasons]
        turns = [
            (work, repeat)
            for work, repeat in product(self._works, range(self._repeats))
            if not all(self._is_done(entrant, work, repeat, done) for entrant in able)
        ]
        if not turns:
            return
        with tempfile.TemporaryDirectory(prefix="tessera-bench-") as scratch:
            racers = None if self._options.one_at_a_time else self._start_all(able, Path(scratch))
            self._order = "one at a time" if racers is None else "in turns"
            if racers is not None:
                yield from self._race(racers, turns)
                return
            for entrant in able:
                yield from self._race([self._start(entrant, Path(scratch))], turns)

    def _fitted(self, config: EngineConfig) -> EngineConfig:
        """The engine with room for the largest work and no more, so that several engines fit a device.

        Peers know a model by its folder alone: where that has no weights, they are told so.
        """
        spec, limit = self.target.spec, config.model.max_model_len
        workloads = [work.workload for work in self._works]
        for workload in workloads:
            workload.check_fits(self.target.name, spec.vocab_size, spec.max_position, limit)
        longest = max(workload.max_len for workload in workloads)
        load_format: LoadFormat = "dummy" if self.target.source.random else config.model.load_format
        model = replace(config.model, max_model_len=limit or longest, load_format=load_format)
        most = min(config.scheduler.max_num_seqs, max(workload.num_prompts for workload in workloads))
        return replace(config, model=model, scheduler=replace(config.scheduler, max_num_seqs=most))

    def _start_all(self, entrants: Sequence[Entrant], scratch: Path) -> list[Racer] | None:
        """All of them, loaded and warm; None where memory does not hold them beside one another.

        Whoever does no better alone is not held against the others, who go on beside one another.
        """
        alone: dict[str, Racer] = {}
        while True:
            racers, wanting = self._start_beside(entrants, scratch, alone)
            if wanting is None:
                return racers
            label = wanting.subject.label
            logger.info("%s wants memory: trying it alone", label)
            alone[label] = racer = self._start(wanting, scratch)
            racer.close()
            if not self._wants_memory(racer):
                logger.warning("memory does not hold %s beside the others: one subject at a time", label)
                return None

    def _start_beside(
        self, entrants: Sequence[Entrant], scratch: Path, alone: Mapping[str, Racer]
    ) -> tuple[list[Racer], Entrant | None]:
        """All of them, and None; or nobody, and the first that may do better alone. Those in `alone` do not."""
        racers: list[Racer] = []
        try:
            for entrant in entrants:
                tried = alone.get(entrant.subject.label)
                if tried is not None and tried.failure:
                    racers.append(tried)
                    continue
                has_others = any(racer.process for racer in racers)
                racers.append(self._start(entrant, scratch))
                if has_others and tried is None and self._wants_memory(racers[-1]):
                    close_all(racers)
                    return [], entrant
        except BaseException:
            close_all(racers)
            raise
        return racers, None

    def _start(self, entrant: Entrant, scratch: Path) -> Racer:
        racer = Racer(entrant, entrant.subject)
        label, began = entrant.subject.label, time.monotonic()
        logger.info("loading %s", label)
        try:
            settings = entrant.settings(scratch)
            racer.process = WorkerProcess(entrant.command, self._options.pass_timeout)
            racer.facts = racer.process.ask("load", settings=settings)
            racer.subject = entrant.started(entrant.subject, racer.facts)
            for work in self._works:
                passes = [self._pass(racer.process, work) for _ in range(self._options.warmup)]
                racer.warmup_seconds[work.workload.name] = sum(float(found["seconds"]) for found in passes)
            logger.info("%s is loaded and warm after %.1f s", label, time.monotonic() - began)
        except (WorkerError, TesseraError) as error:
            racer.fail(error)
        except BaseException:
            racer.close()
            raise
        return racer

    def _wants_memory(self, racer: Racer) -> bool:
        """Whether it may do better alone. A peer tells why a GPU is too full in the log of its own process only."""
        full = bool(racer.failure) and self.target.device == "cuda"
        return racer.no_memory or full or self._is_short(racer)

    def _is_short(self, racer: Racer) -> bool:
        """Whether an engine of ours got less cache than the work takes because others hold the memory."""
        info = (racer.facts or {}).get("info")
        if info is None or racer.failure or self.config.cache.num_pages is not None:
            return False
        for work in self._works:
            longest = sorted(work.lengths, reverse=True)[: self.config.scheduler.max_num_seqs]
            if info["num_pages"] < sum(-(-length // info["page_size"]) for length in longest):
                return True
        return False

    def _race(self, racers: list[Racer], turns: Sequence[tuple[Work, int]]) -> Iterator[Record]:
        """These repeats of every racer, the order turned round each time."""
        try:
            for work, repeat in turns:
                for racer in racers if repeat % 2 == 0 else racers[::-1]:
                    yield self._measure(racer, work, repeat)
        finally:
            close_all(racers)

    def _measure(self, racer: Racer, work: Work, repeat: int) -> Record:
        if racer.process is not None:
            try:
                found = self._pass(racer.process, work)
                memory = racer.process.ask("memory")["memory"]
                return self._ok(racer, work, repeat, found, memory)
            except (WorkerError, ValueError) as error:
                racer.fail(error)
        return self._row(racer.subject, work, racer.status, repeat, reason=racer.failure)

    def _pass(self, process: WorkerProcess, work: Work) -> dict[str, Any]:
        """One pass, with as many tokens as were asked for; WorkerError otherwise."""
        given = {"prompts": work.prompts, "output_lens": work.output_lens}
        found = process.ask("run", **given, temperature=self._options.temperature)
        output_lens = [len(output) for output in found["output_ids"]]
        if output_lens != work.output_lens:
            wanted = f"{len(work.output_lens)} answers with {work.num_output} tokens were asked for"
            raise WorkerError(f"{wanted}, {len(output_lens)} with {sum(output_lens)} came back")
        if (num_prompt := sum(map(len, work.prompts))) != found["prompt_tokens"]:
            raise WorkerError(f"{num_prompt} prompt tokens were sent, {found['prompt_tokens']} were computed")
        return found

    def _ok(self, racer: Racer, work: Work, repeat: int, found: dict[str, Any], memory: dict[str, int]) -> Record:
        seconds, num_output = float(found["seconds"]), work.num_output
        metrics = {
            "seconds": seconds,
            "req_s": len(work.prompts) / seconds,
            "output_tok_s": num_output / seconds,
            "total_tok_s": (num_output + found["prompt_tokens"]) / seconds,
            "warmup_seconds": racer.warmup_seconds[work.workload.name],
        }
        of_device = memory.get("gpu" if self.target.device == "cuda" else "host")
        metrics |= {} if of_device is None else {"peak_memory_bytes": float(of_device)}
        metrics |= {name: float(value) for name, value in found.get("counters", {}).items()}
        samples = {}
        for name, key in (("latency_ms", "latencies_s"), ("ttft_ms", "first_token_s")):
            if key in found:
                samples[name] = [1000 * value for value in found[key]]
                metrics |= {f"{name}_p{part}": percentile(samples[name], part) for part in (50, 99)}
        return self._row(racer.subject, work, "ok", repeat, metrics=metrics, samples=samples, facts=racer.facts)

    def _row(
        self,
        subject: Subject,
        work: Work,
        status: Status,
        repeat: int,
        *,
        facts: dict[str, Any] | None = None,
        **more: Any,
    ) -> Record:
        return Record(
            kind=self.kind,
            case=self._case(work),
            subject=subject,
            status=status,
            conditions=self._conditions(subject, repeat, facts or {}),
            provenance=self._provenance,
            repeat=repeat,
            **more,
        )

    def _conditions(self, subject: Subject, repeat: int, facts: dict[str, Any]) -> Conditions:
        config = self.config
        cached = config.cache.enable_prefix_caching and subject.engine in ("tessera", "vllm")
        cold = self._options.warmup == 0 and repeat == 0
        cache: CacheState = "off" if not cached else "cold" if cold else "warm"
        info = facts.get("info", {})
        settings = {name: info[name] for name in OF_ENGINE if name in info}
        settings |= {"load_format": config.model.load_format, "ignore_eos": True, **facts.get("settings", {})}
        return Conditions(
            model=self.target.name,
            dtype=facts.get("dtype", self.target.dtype),
            device=self.target.device,
            seed=config.model.seed,
            warmup=f"{self._options.warmup} x the same work" if self._options.warmup else "none",
            cache=cache,
            settings=settings | {"order": self._order} | facts.get("versions", {}),
        )

    def _is_done(self, entrant: Entrant, work: Work, repeat: int, done: Container[Done]) -> bool:
        row = self._row(entrant.subject, work, "failed", repeat, reason="not run")
        return Done(row.case_key, entrant.subject.label, repeat) in done
