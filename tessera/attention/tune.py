"""Tuning: a few options beside those that are shipped, checked, timed on a model's own shapes, and kept if faster.

A search tries each step away from the table's options alone, then all that helped together, in a box of seconds.
Candidates that do not compile or answer wrongly are out, with the reason. The table's options stay unless another is
faster by more than noise, twice, and slower in none of the sizes. The kernel for Hopper GPUs is not part of it:
its options (`hopper_options`) are few, and were tried on the one kind of GPU that runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

import torch

from tessera.attention import tune_store
from tessera.attention.backends.triton import Triton, uses_hopper_kernel
from tessera.attention.backends.triton_choice import Choice, gpu_name, known_gpu, parts, shipped
from tessera.attention.backends.triton_options import Options, device_resources
from tessera.attention.contract import AttentionBackend, Phase, Shape
from tessera.attention.measure import ALIKE, HOPELESS
from tessera.attention.registry import reasons_against, shape_in
from tessera.attention.timing import Inputs, make_inputs, time_call
from tessera.attention.tune_space import Candidate, neighbours, problem_with, sizes_of, take, together
from tessera.attention.tune_store import Found, Part, Trial
from tessera.errors import BackendError
from tessera.log import logger

SEARCH_SECONDS = {"cuda": 20.0, "cpu": 60.0}
"""A search begins no further candidate after so long; one that is begun is finished. Nine of them take about as long on
a GPU, where each is compiled for one to two seconds; on a CPU the interpreter is slow, and only tests wait for it."""
START_SECONDS = 60.0
"""All searches of a start together, enough for a model whose layers are alike. What is left is searched next time."""

Bind = Callable[[Phase, Shape, Choice], AttentionBackend[Any]]
Timer = Callable[[AttentionBackend[Any], Inputs, float], float]
"""(backend, inputs, milliseconds after which one call is enough) -> milliseconds of a layer."""


@dataclass(frozen=True)
class Wanted:
    """What is to be searched: a part of a phase on one shape."""

    phase: Phase
    part: Part
    shape: Shape
    max_len: int | None = None
    """Tokens in the longest sequence."""


def bind(phase: Phase, shape: Shape, options: Choice) -> AttentionBackend[Any]:
    """`triton` with these options, without the kernel that has others."""
    return Triton(phase, shape, options, hopper=False)


def layer_ms(backend: AttentionBackend[Any], inputs: Inputs, give_up_ms: float) -> float:
    """Milliseconds of one layer with cold caches, on a GPU decoding as a graph."""
    return time_call(backend, inputs, give_up_ms=give_up_ms).run_ms


def all_wanted(phases: Iterable[Phase], shapes: Iterable[Shape], max_len: int | None = None) -> list[Wanted]:
    """Every search that these phases and shapes have, those left out that `why_not` has a reason against."""
    pairs = [(phase, shape_in(phase, shape)) for phase in phases for shape in dict.fromkeys(shapes)]
    pairs = [(phase, shape) for phase, shape in dict.fromkeys(pairs) if not why_not(phase, shape)]
    return [Wanted(phase, part, shape, max_len) for phase, shape in pairs for part in parts(phase, shape)]


def why_not(phase: Phase, shape: Shape) -> list[str]:
    """Why there is nothing to search in a phase of a shape."""
    if reasons := reasons_against("triton", phase, [shape]):
        return reasons
    if phase is Phase.PREFILL and uses_hopper_kernel(phase, shape):
        return ["the kernel for Hopper GPUs serves these prompts, whose options are not tuned"]
    return []


def tune_at_start(phases: Sequence[Phase], shapes: Sequence[Shape], max_len: int | None, *, anew: bool) -> None:
    """Search what the shipped tables do not know this GPU for; at once over where they do, or where it is kept.

    anew  search again what is kept

    A search that fails is a warning: what is shipped serves.
    """
    if not is_unknown(shapes[0]):
        return
    wanted = [each for each in all_wanted(phases, shapes, max_len) if anew or not _kept(each)]
    if not wanted:
        return
    logger.info(
        "tuning triton for %s, once, for at most about %.0f s", gpu_name(shapes[0]) or "this device", START_SECONDS
    )
    deadline = time.perf_counter() + START_SECONDS
    for each in wanted:
        if (left := deadline - time.perf_counter()) <= 0:
            logger.debug("%s, %s: the time for tuning at start was over", each.phase, each.part)
            continue
        try:
            found = search(each, seconds=min(left, SEARCH_SECONDS[each.shape.device_type]))
        except Exception as error:  # what a compiler raises; it is no reason not to serve
            logger.warning("%s attention of triton is not tuned: %s", each.phase, _one_line(error))
            continue
        keep([(each, found)])


def is_unknown(shape: Shape) -> bool:
    """Whether no shipped table was measured on the GPU that will run; a processor has nothing to be tuned for."""
    return shape.device_type == "cuda" and known_gpu(gpu_name(shape), shape.capability) is None


def keep(results: Iterable[tuple[Wanted, Found]]) -> None:
    """Keep what was found on disk, where every later start finds it."""
    tune_store.write((each.phase, each.part, each.shape, found) for each, found in results)


def kept(wanted: Wanted) -> Found | None:
    """What an earlier search on this device came to."""
    return tune_store.read(wanted.phase, wanted.part, wanted.shape)


def _kept(wanted: Wanted) -> bool:
    return kept(wanted) is not None


@torch.inference_mode()
def search(wanted: Wanted, *, seconds: float | None = None, bind: Bind = bind, timer: Timer = layer_ms) -> Found:
    """The best options found within the time, with everything that was tried.

    BackendError where the shipped options answer wrongly; whatever a compiler raises where they do not compile.
    """
    started = time.perf_counter()
    phase, shape = wanted.phase, wanted.shape
    deadline = started + (SEARCH_SECONDS[shape.device_type] if seconds is None else seconds)
    table = _of(shipped(phase, shape, device_resources(shape)[1], gpu_name(shape)), wanted.part)
    trials = _Trials(wanted, bind, timer, table)
    candidates = neighbours(phase, table, shape)
    untried = len(candidates)
    for candidate in candidates:
        if time.perf_counter() > deadline:
            break
        trials.add(candidate)
        untried -= 1
    best = trials.best(untried == 0 and time.perf_counter() <= deadline)
    if shape.device_type == "cuda":
        torch.cuda.empty_cache()
    taken = time.perf_counter() - started
    logger.debug("%s, %s: %s instead of %s, %.1f s", phase, wanted.part, best.label, table.label, taken)
    return Found(best, [size.label for size in trials.sizes], trials.trials, untried, round(taken, 2))


class _Trials:
    """What is tried in one search, the table's options first."""

    def __init__(self, wanted: Wanted, bind: Bind, timer: Timer, table: Options) -> None:
        self._wanted, self._bind, self._timer, self._table = wanted, bind, timer, table
        phase, shape = wanted.phase, wanted.shape
        self._alike = ALIKE[shape.device_type]
        self.sizes = sizes_of(phase, wanted.part, shape, wanted.max_len)
        self._inputs = [make_inputs(phase, shape, size) for size in self.sizes]
        self._steps: dict[Options, Mapping[str, Any]] = {}
        backend = bind(phase, shape, Choice(table, table, "the table"))
        if problem := problem_with(backend, table):
            raise BackendError(
                f"triton's shipped options answer wrongly in {phase}: {problem}", "see `tessera verify triton`"
            )
        self.trials: list[Trial] = []
        self.trials.append(Trial(table, self._time(backend)))

    def add(self, candidate: Candidate) -> None:
        """Check and time a candidate; whatever is wrong with it is its trial's problem."""
        options, phase, shape = candidate.options, self._wanted.phase, self._wanted.shape
        self._steps[options] = candidate.step
        try:
            backend = self._bind(phase, shape, Choice(options, options, "a candidate"))
            problem = problem_with(backend, options)
            trial = Trial(options, problem=problem) if problem else Trial(options, self._time(backend))
        except Exception as error:  # a compiler raises what it likes
            trial = Trial(options, problem=_one_line(error))
        if trial.problem:
            logger.debug("%s: %s is out: %s", phase, options.label, trial.problem)
        self.trials.append(trial)

    def best(self, has_time: bool) -> Options:
        """The fastest, if it is so a second time too; with time, after all steps that helped were tried together."""
        if has_time and len(faster := self._faster()) > 1:
            step = together(self._steps[trial.options] for trial in faster)
            both = take(self._wanted.phase, self._table, step, self._wanted.shape)
            if both is not None and both not in self._steps and both != self._table:
                self.add(Candidate(both, step))
        for trial in self._faster()[:1]:
            phase, shape = self._wanted.phase, self._wanted.shape
            first, again = (
                self._time(self._bind(phase, shape, Choice(options, options, "once more")))
                for options in (self._table, trial.options)
            )
            if self._is_faster(again, first):
                return trial.options
        return self._table

    def _faster(self) -> list[Trial]:
        """Those that beat the table by more than noise, the fastest first."""
        of_table = self.trials[0].times_ms
        faster = [trial for trial in self.trials[1:] if not trial.problem and self._is_faster(trial.times_ms, of_table)]
        return sorted(faster, key=lambda trial: _ratio(trial.times_ms, of_table))

    def _is_faster(self, times: Sequence[float], than: Sequence[float]) -> bool:
        """By more than noise over all sizes, and in none slower by as much."""
        slower = any(mine > (1 + self._alike) * theirs for mine, theirs in zip(times, than))
        return not slower and _ratio(times, than) * (1 + self._alike) < 1

    def _time(self, backend: AttentionBackend[Any]) -> list[float]:
        limits = (
            [HOPELESS * ms for ms in self.trials[0].times_ms] if self.trials else [float("inf")] * len(self._inputs)
        )
        return [round(self._timer(backend, inputs, limit), 5) for inputs, limit in zip(self._inputs, limits)]


def _of(choice: Choice, part: Part) -> Options:
    return choice.many if part is Part.MANY else choice.few


def _ratio(times: Sequence[float], than: Sequence[float]) -> float:
    """How many times as long, as the geometric mean over the sizes."""
    return exp(sum(log(mine / theirs) for mine, theirs in zip(times, than)) / len(times))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
