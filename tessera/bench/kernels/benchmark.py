"""Kernels against one another: each backend of a case is checked, proven, and timed in turn with the others."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch

from tessera.attention.contract import Shape
from tessera.attention.registry import load_backend, shape_in
from tessera.bench.benchmark import Done
from tessera.bench.kernels.cases import KernelCase, Part
from tessera.bench.kernels.ceilings import (
    Ceilings,
    Measurement,
    ceiling_records,
    ceilings_of,
    measure_ceilings,
    num_ceilings,
)
from tessera.bench.kernels.context import Context, one_line
from tessera.bench.kernels.entrants import Entrant, Field
from tessera.bench.kernels.figures import Runner, cost_of, metrics_of
from tessera.bench.kernels.inputs import (
    MEMORY_SHARE,
    bytes_needed,
    expected_of,
    make_part_inputs,
    num_copies,
)
from tessera.bench.kernels.ladder import LADDERS, idea_of
from tessera.bench.kernels.profile import CallProfile, profile_call, with_counters
from tessera.bench.kernels.timing import WARM_UP, Cold, Problem, prepare, uses_graph
from tessera.bench.provenance import Provenance
from tessera.bench.provenance import provenance as provenance_now
from tessera.bench.record import Conditions, Kind, Record, Status, Subject, Value
from tessera.runner.device import capability, choose_device, device_name, shared_memory
from tessera.runner.memory import free_memory_bytes, gib


class KernelBenchmark:
    """Every backend on every case; a row (Record) a backend and case, all its repeats in `samples`.

    cases     compared one after the other
    backends  as `--backends` has it: names, pairs, `usable`, `all`; ConfigError for `auto`, which is no kernel
    device    `auto`, `cpu` or `cuda`
    ladder    each case by the ladder of its phase, in place of `backends`
    profile   look into each call once it has been timed; what was found is in `profiles`

    The first rows are what the machine can do at most, measured in the same run.
    """

    kind: Kind = "kernels"

    def __init__(
        self,
        cases: Sequence[KernelCase],
        *,
        backends: str = "usable",
        device: str = "auto",
        repeats: int = 15,
        seed: int = 0,
        ladder: bool = False,
        profile: bool = False,
        provenance: Provenance | None = None,
    ) -> None:
        self.cases = list(dict.fromkeys(cases))
        self._device = choose_device(device)
        self._repeats, self._seed = repeats, seed
        self._ladder, self._profile = ladder, profile
        self._field = Field(backends, ladder=ladder)
        self.profiles: list[CallProfile] = []
        self._context = Context(self._device.type)
        self._provenance = provenance or provenance_now()

    @property
    def num_records(self) -> int:
        """Ceilings included."""
        return num_ceilings(self._device.type, self._dtypes) + sum(len(found) for _, found in self._program)

    def records(self, done: Container[Done] = ()) -> Iterator[Record]:
        """Ceilings first, then case by case; see `tessera.bench.benchmark.Benchmark`."""
        left = [
            (case, [each for each in found if not self._is_done(case, each, done)]) for case, found in self._program
        ]
        if not any(entrants for _, entrants in left):
            return
        measured = measure_ceilings(self._device.type, self._dtypes, self._context)
        yield from ceiling_records(measured, self._device.type, self._provenance, done)
        for case, entrants in left:
            if entrants:
                yield from self._run_case(case, entrants, measured)

    @property
    def _dtypes(self) -> list[torch.dtype]:
        return list(dict.fromkeys(getattr(torch, case.dtype) for case in self.cases))

    @cached_property
    def _program(self) -> list[tuple[KernelCase, list[Entrant]]]:
        return [(case, self._field.entrants(case, self._shape(case))) for case in self.cases]

    @cached_property
    def _cold(self) -> Cold:
        return Cold(self._device.type)

    def _is_done(self, case: KernelCase, entrant: Entrant, done: Container[Done]) -> bool:
        return Done(self._row(case, entrant.subject, "failed", reason="-").case_key, entrant.label, 0) in done

    def _shape(self, case: KernelCase) -> Shape:
        return Shape(
            num_q_heads=case.heads.query,
            num_kv_heads=case.heads.kv,
            head_dim=case.heads.dim,
            scale=case.heads.dim**-0.5,
            dtype=getattr(torch, case.dtype),
            device_type=self._device.type,
            capability=capability(self._device),
            page_size=case.page_size,
            window=case.window,
            soft_cap=case.soft_cap,
            shared_memory=shared_memory(self._device),
        )

    def _run_case(self, case: KernelCase, entrants: Sequence[Entrant], measured: list[Measurement]) -> Iterator[Record]:
        ready = [each for each in entrants if not each.reasons]
        runners = self._time_case(case, ready) if ready else {}
        for each in entrants:
            if each.reasons:
                yield self._row(case, each.subject, "unavailable", reason="; ".join(each.reasons))
            elif (runner := runners[each.label]).failure:
                yield self._row(case, each.subject, "failed", reason=runner.failure)
            else:
                yield self._figures(case, runner, ceilings_of(measured, case.dtype))
        found = self._look_into(case, runners.values(), ceilings_of(measured, case.dtype)) if self._profile else []
        for left in runners.values():
            left.parts.clear()
        self._context.tidy()
        self.profiles += [with_counters(each, self._seed) for each in found]

    @torch.inference_mode()
    def _look_into(self, case: KernelCase, runners: Iterable[Runner], ceilings: Ceilings | None) -> list[CallProfile]:
        """Profile what was timed, one call after the other."""
        profiles = []
        for runner in runners:
            for timed, part in zip(runner.parts, case.parts):
                if not runner.failure and not self._context.lost:
                    work = replace(case, parts=(part,))
                    found = profile_call(timed, work, cost_of(case, part), ceilings, self._cold)
                    profiles.append(found)
                    if found.problem:
                        self._context.probe(f"the profile of {runner.entrant.label} in {case.phase}", found.problem)
        return profiles

    @torch.inference_mode()
    def _time_case(self, case: KernelCase, entrants: Sequence[Entrant]) -> dict[str, Runner]:
        """Everyone checked and proven first, then timed in turn, so that drift hits all alike."""
        runners = {each.label: Runner(each) for each in entrants}
        problems, failure = self._problems_or_failure(case, entrants)
        for runner in runners.values():
            runner.failure = failure
        for runner in runners.values():
            self._attempt(case, runner, partial(self._prepare, runner, problems))
        for number in range(self._repeats):
            alive = [runner for runner in runners.values() if not runner.failure]
            first = number % max(1, len(alive))
            for runner in alive[first:] + alive[:first]:  # nobody always follows the same
                self._attempt(case, runner, runner.sample)
        for runner in runners.values():
            self._attempt(case, runner, runner.check)
        for runner in runners.values():
            runner.failure = runner.failure or self._context.lost  # also of those that were done before
        return runners

    def _prepare(self, runner: Runner, problems: Sequence[Problem]) -> None:
        for problem in problems:
            backend = load_backend(runner.entrant.names[problem.part.phase])
            runner.parts.append(prepare(backend, problem, self._cold))

    def _attempt(self, case: KernelCase, runner: Runner, act: Callable[[], object]) -> None:
        """Do it, unless the runner has failed: a library may raise anything, and it is this one's failure only."""
        if runner.failure:
            return
        if self._context.lost:
            runner.failure = self._context.lost
            return
        try:
            act()
        except Exception as error:
            runner.failure = one_line(error)
        if runner.failure:  # outside of the handler, for the error holds what it was raised from
            runner.parts.clear()
            self._context.probe(f"{runner.entrant.label} in {case.phase} {case.workload}", runner.failure)

    def _problems_or_failure(self, case: KernelCase, entrants: Sequence[Entrant]) -> tuple[list[Problem], str]:
        """What the case asks, or why nobody can be asked."""
        if self._context.lost:
            return [], self._context.lost
        try:
            return self._problems(case, entrants), ""
        except Exception as error:  # out of memory, most of all
            failure = one_line(error)
        self._context.probe(f"the making of inputs for {case.phase} {case.workload}", failure)
        return [], failure

    def _problems(self, case: KernelCase, entrants: Sequence[Entrant]) -> list[Problem]:
        """Inputs and expected answers of every part; MemoryError, with both numbers, where they do not fit."""
        shapes = {part.phase: shape_in(part.phase, self._shape(case)) for part in case.parts}
        copies = {part.phase: self._copies(case, part, shapes[part.phase], entrants) for part in case.parts}
        needed, free = bytes_needed(case, max(copies.values())), free_memory_bytes(self._device)
        if needed > MEMORY_SHARE * free:
            raise MemoryError(
                f"the case needs {gib(needed)}, {gib(int(MEMORY_SHARE * free))} of what is free may be taken"
            )
        problems = []
        for part in case.parts:
            inputs = make_part_inputs(part, shapes[part.phase], copies[part.phase], self._seed)
            expected = expected_of(part, inputs)
            problems.append(Problem(part, inputs, expected, case.mode, device_name(self._device)))
        return problems

    def _copies(self, case: KernelCase, part: Part, shape: Shape, entrants: Sequence[Entrant]) -> int:
        backends = [load_backend(each.names[part.phase]) for each in entrants]
        graph = any(uses_graph(backend, part, case.mode, self._device.type) for backend in backends)
        return num_copies(part, shape, graph=graph)

    def _figures(self, case: KernelCase, runner: Runner, ceilings: Ceilings | None) -> Record:
        """The row of a backend that was timed; without a share of ceilings where they could not be measured."""
        costs = [cost_of(case, part) for part in case.parts]
        total = costs[0] if len(costs) == 1 else costs[0] + costs[1]
        ways = {timed.proof.phase: timed.way for timed in runner.parts}
        subject = Subject(
            runner.entrant.label,
            asked=runner.entrant.asked,
            resolved={phase: [name] for phase, name in runner.entrant.asked.items()},
            proofs=[timed.proof for timed in runner.parts],
        )
        settings: dict[str, Value] = {"timed_as": "+".join(dict.fromkeys(ways.values()))}
        metrics = metrics_of(runner, total, sum(part.tokens for part in case.parts))
        if ceilings is not None:
            least_ms = sum(each.least_ms(ceilings.flop_s, ceilings.bytes_s) for each in costs)
            metrics["ceiling_share"] = least_ms / metrics["ms_median"]
            settings |= {
                "bound": total.bound(ceilings.flop_s, ceilings.bytes_s),
                "ceiling_tflop_s": ceilings.flop_s / 1e12,
                "ceiling_tb_s": ceilings.bytes_s / 1e12,
            }
        if self._ladder:
            phase = case.parts[0].phase
            rung = LADDERS[phase].index(runner.entrant.label)
            settings |= {"rung": rung, "idea": idea_of(runner.entrant.label, phase)}
        metrics["checked_tokens"] = float(sum(timed.num_checked for timed in runner.parts))
        return self._row(case, subject, "ok", settings=settings, metrics=metrics, samples=runner.samples)

    def _row(
        self,
        case: KernelCase,
        subject: Subject,
        status: Status,
        *,
        reason: str = "",
        settings: dict[str, Value] | None = None,
        metrics: dict[str, float] | None = None,
        samples: dict[str, list[float]] | None = None,
    ) -> Record:
        threads = torch.get_num_threads() if self._device.type == "cpu" else None
        return Record(
            kind="kernels",
            case=case.fields,
            subject=subject,
            status=status,
            conditions=Conditions(
                dtype=case.dtype,
                device=self._device.type,
                seed=self._seed,
                warmup=WARM_UP,
                cache="cold",
                settings={"repeats": self._repeats, "threads": threads, **(settings or {})},
            ),
            provenance=self._provenance,
            metrics=metrics or {},
            samples=samples or {},
            reason=reason,
        )
