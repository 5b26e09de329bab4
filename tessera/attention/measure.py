"""Measured choice: every candidate timed on the model's own shapes, in sizes of step that occur.

Times are of one layer with cold caches: keys are read from several pools in turn, on a GPU behind a
write that fills its cache, and as a CUDA graph where a backend allows one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tessera.attention.contract import AttentionBackend, Phase, Shape
from tessera.attention.selftest import self_test_problem
from tessera.attention.step import Bucket
from tessera.attention.timing import Inputs, make_inputs, time_call
from tessera.log import logger
from tessera.types import AttentionBucket, AttentionChoice

BUCKETS = {
    ("cuda", Phase.DECODE): [Bucket(n, 1, kv) for kv in (4096, 512, 16384) for n in (64, 1, 256, 8)],
    ("cuda", Phase.PREFILL): [
        Bucket(1, 2048, 2048),
        Bucket(4, 512, 512),
        Bucket(16, 128, 128),
        Bucket(1, 8192, 8192),
        Bucket(1, 1024, 8192),
    ],
    ("cuda", Phase.VISION): [Bucket(1, 1024, 1024), Bucket(8, 256, 256)],
    ("cpu", Phase.DECODE): [Bucket(n, 1, kv) for kv in (512, 128) for n in (8, 1, 32)],
    ("cpu", Phase.PREFILL): [Bucket(1, 256, 256), Bucket(1, 64, 64)],
    ("cpu", Phase.VISION): [Bucket(1, 256, 256)],
}
"""Sizes that are timed, the most telling first: when time is short the last are left out."""
SETUP_SECONDS = {"cpu": 20.0, "cuda": 8.0}
"""No further candidate of a phase is set up, tested and compiled after so long, those of the fixed order before the
others: far more than all of them take where their kernels are on disk."""
TIMING_SECONDS = {"cpu": 1.0, "cuda": 5.0}
"""No further size is timed after so long; what is begun is finished, for a few calls of some and many of others would
let chance decide."""
HOPELESS = 20
"""Who takes so many times as long as the best is timed once a size."""
FIRST_CALL_SECONDS = 20.0
"""A backend that takes longer to compile is left out."""
MAX_POOL_BYTES = {"cpu": 2**26, "cuda": 2**31}
"""Sizes whose keys and values take more in one layer are left out."""
ALIKE = {"cpu": 0.10, "cuda": 0.03}
"""Times that differ by less are alike; then the order of preference decides, on a GPU after the number of wins."""


@dataclass(frozen=True)
class Measured:
    """What timing one phase found."""

    buckets: list[AttentionBucket]
    rejected: dict[str, list[str]] = field(default_factory=dict)
    """Of every backend that serves no bucket, why."""
    waiting: list[str] = field(default_factory=list)
    """Those that were left out because they must be compiled first: once that is done they are to be timed."""

    def as_choice(self, phase: Phase, reason: str) -> AttentionChoice:
        """The choice that follows: the backend that wins most sizes, and each size's own."""
        most = Counter(bucket.backend for bucket in self.buckets).most_common(1)[0][0]
        if all(len(bucket.times_ms) == 1 for bucket in self.buckets):
            reason = "auto: no other is timed here"
        return AttentionChoice(str(phase), most, reason, self.rejected, self.buckets)


def buckets_for(phase: Phase, device_type: str, max_len: int | None) -> list[Bucket]:
    """The sizes to time, none longer than a sequence may become; that length itself where all are."""
    buckets = BUCKETS[device_type, phase]
    fitting = [bucket for bucket in buckets if max_len is None or bucket.kv_len <= max_len]
    if fitting or max_len is None:
        return fitting
    return [Bucket(1, 1 if phase is Phase.DECODE else max_len, max_len)]


@torch.inference_mode()
def measure(
    phase: Phase,
    candidates: Sequence[type[AttentionBackend[Any]]],
    layers: Mapping[Shape, int],
    buckets: Sequence[Bucket],
) -> Measured:
    """Time `candidates`, given in the order of preference, and pick a winner for each size.

    layers  of each shape in the model, how many layers have it

    On a CPU one backend wins all sizes, so that an answer never depends on how many sequences are in a step.
    `buckets` of the result is empty where no candidate gave a right answer.
    """
    device_type = next(iter(layers)).device_type
    deadline = time.perf_counter() + SETUP_SECONDS[device_type]
    rejected: dict[str, list[str]] = {}
    bound: dict[str, list[AttentionBackend[Any]]] = {}
    for candidate in candidates:
        instances, problem = _bind(candidate, phase, layers, deadline)
        if problem:
            rejected[candidate.name] = [problem]
        else:
            bound[candidate.name] = instances
    times: dict[Bucket, dict[str, float]] = {}
    deadline = time.perf_counter() + TIMING_SECONDS[device_type]
    for bucket in buckets:
        if times and time.perf_counter() > deadline:
            break
        if found := _time_bucket(bucket, bound, layers, rejected):
            times[bucket] = found
    if device_type == "cuda":
        torch.cuda.empty_cache()  # weights and cache come after this and want the memory
    for name in rejected:
        for of_bucket in times.values():
            of_bucket.pop(name, None)
    preference = [candidate.name for candidate in candidates if candidate.name not in rejected]
    return _conclude({b: t for b, t in times.items() if t}, preference, rejected, device_type)


def _bind(
    candidate: type[AttentionBackend[Any]], phase: Phase, layers: Mapping[Shape, int], deadline: float
) -> tuple[list[AttentionBackend[Any]], str | None]:
    """The candidate bound to each shape, and what is against it: a wrong answer, an error, a long compilation."""
    started = time.perf_counter()
    if started > deadline:
        return [], "not timed: the time for measuring was over"
    try:
        instances = [candidate(phase, shape) for shape in layers]
    except Exception as error:  # whatever a library raises, it cannot serve
        return [], f"cannot be set up: {_one_line(error)}"
    for instance in instances:
        if problem := self_test_problem(instance):
            return [], f"fails its self-test: {problem}"
    seconds = time.perf_counter() - started
    if seconds > FIRST_CALL_SECONDS:
        return [], f"took {seconds:.0f} s to compile, {FIRST_CALL_SECONDS:.0f} s are allowed"
    logger.debug("%s: %s was set up and tested in %.2f s", phase, candidate.name, seconds)
    return instances, None


def _time_bucket(
    bucket: Bucket,
    bound: Mapping[str, list[AttentionBackend[Any]]],
    layers: Mapping[Shape, int],
    rejected: dict[str, list[str]],
) -> dict[str, float]:
    """Milliseconds a layer of each backend in one size of step; whoever fails goes to `rejected`."""
    times = dict.fromkeys((name for name in bound if name not in rejected), 0.0)
    num_layers = sum(layers.values())
    for index, (shape, count) in enumerate(layers.items()):
        phase = next(iter(bound.values()))[0].phase if bound else Phase.DECODE
        if _pool_bytes(bucket, shape) > MAX_POOL_BYTES[shape.device_type]:
            return {}
        inputs = make_inputs(phase, shape, bucket)
        best = float("inf")
        for name in list(times):
            try:
                milliseconds = _time(bound[name][index], inputs, num_layers, best)
            except Exception as error:
                rejected[name] = [f"fails at {bucket.label}: {_one_line(error)}"]
                del times[name]
                continue
            best = min(best, milliseconds)
            times[name] += milliseconds * count / num_layers
    return times


def _time(backend: AttentionBackend[Any], inputs: Inputs, num_layers: int, best: float) -> float:
    started = time.perf_counter()
    taken = time_call(backend, inputs, give_up_ms=HOPELESS * best)
    seconds = time.perf_counter() - started
    if seconds > FIRST_CALL_SECONDS:
        raise TimeoutError(f"compiling and timing took {seconds:.0f} s")
    logger.debug("%s: %s took %.2f s to be timed", backend.phase, backend.name, seconds)
    return taken.total(num_layers)


def _conclude(
    times: Mapping[Bucket, Mapping[str, float]],
    preference: Sequence[str],
    rejected: dict[str, list[str]],
    device_type: str,
) -> Measured:
    if not times:
        return Measured([], rejected)
    winners = _one_winner(times, preference) if device_type == "cpu" else _winners(times, preference)
    buckets = [_bucket(bucket, winners[bucket], of_bucket) for bucket, of_bucket in times.items()]
    chosen = set(winners.values())
    for name in preference:
        if name not in chosen:
            ratios = [of[name] / of[winners[bucket]] for bucket, of in times.items() if name in of]
            rejected[name] = [_slower(ratios)]
    return Measured(buckets, rejected)


def _winners(times: Mapping[Bucket, Mapping[str, float]], preference: Sequence[str]) -> dict[Bucket, str]:
    """The fastest of each size; of those that are alike, who is fastest most often, so that few libraries serve."""
    fastest = [min(of_bucket, key=of_bucket.__getitem__) for of_bucket in times.values()]
    order = sorted(preference, key=lambda name: -fastest.count(name))
    return {
        bucket: next(name for name in order if name in of and of[name] <= (1 + ALIKE["cuda"]) * min(of.values()))
        for bucket, of in times.items()
    }


def _one_winner(times: Mapping[Bucket, Mapping[str, float]], preference: Sequence[str]) -> dict[Bucket, str]:
    """For every size the same: the least sum of times, each as a multiple of the fastest of its size."""
    sums = {
        name: sum(of[name] / min(of.values()) for of in times.values())
        for name in preference
        if all(name in of for of in times.values())
    }
    winner = next(name for name, total in sums.items() if total <= (1 + ALIKE["cpu"]) * min(sums.values()))
    return dict.fromkeys(times, winner)


def _bucket(bucket: Bucket, winner: str, times: Mapping[str, float]) -> AttentionBucket:
    ranked = sorted(times, key=times.__getitem__)
    runner_up = next((name for name in ranked if name != winner), None)
    return AttentionBucket(bucket.label, *bucket, winner, runner_up, {name: round(times[name], 5) for name in ranked})


def _slower(ratios: Sequence[float]) -> str:
    if not ratios:
        return "not timed: the time for measuring was over"
    return f"measured: {min(ratios):.2f} to {max(ratios):.2f} times as long" + (
        "" if min(ratios) > 1 else ", which is not shorter often enough"
    )


def _pool_bytes(bucket: Bucket, shape: Shape) -> int:
    return 2 * bucket.num_seqs * bucket.kv_len * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
