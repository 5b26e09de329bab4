"""Tuning: the fastest right candidate is chosen, in a box of seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from attention_cases import make_shape
from tessera.attention import tune, tune_space
from tessera.attention.backends.naive import Naive
from tessera.attention.backends.triton_choice import Choice, parts, shipped
from tessera.attention.backends.triton_options import LEAST_SHARED_MEMORY, Options
from tessera.attention.contract import AttentionBackend, Batch, Phase, Shape
from tessera.attention.timing import Inputs
from tessera.attention.tune import Wanted, search
from tessera.attention.tune_store import Found, Part, Trial
from tessera.errors import BackendError
from tessera.log import logger

SHAPE = make_shape(dtype=torch.float16)
PREFILL = Wanted(Phase.PREFILL, Part.ALL, SHAPE)
FEW = Wanted(Phase.DECODE, Part.FEW, SHAPE)
TABLE = shipped(Phase.PREFILL, SHAPE, LEAST_SHARED_MEMORY).few


class Imagined(Naive):
    """Answers right, and would be compiled with its options."""

    def __init__(self, phase: Phase, shape: Shape, choice: Choice) -> None:
        super().__init__(phase, shape)
        self.options = choice.few


class Clock:
    """Time that passes only while something is timed, `seconds` at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.now, self.seconds, self.timed = 0.0, seconds, 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def timer(self, _backend: AttentionBackend[Any], _inputs: Inputs, _give_up_ms: float) -> float:
        self.now += self.seconds
        self.timed += 1
        return 1.0


def taking(milliseconds: Callable[[Options], float]) -> Callable[[Any, Inputs, float], float]:
    """A timer for whom the options alone decide."""
    return lambda backend, _inputs, _give_up_ms: milliseconds(backend.options)


def find(milliseconds: Callable[[Options], float], wanted: Wanted = PREFILL, bind: Any = Imagined) -> Found:
    return search(wanted, bind=bind, timer=taking(milliseconds))


def test_the_fastest_candidate_is_chosen_and_the_table_stands_first() -> None:
    found = find(lambda options: 0.5 if options.block_n == 2 * TABLE.block_n else 0.8 if options != TABLE else 1.0)
    assert found.best.block_n == 2 * TABLE.block_n
    assert found.table.options == TABLE and found.table.times_ms == [1.0] and found.untried == 0
    assert not any(trial.problem for trial in found.trials)


def test_steps_that_each_help_are_tried_together_as_well() -> None:
    found = find(lambda options: (0.8 if options.block_n > TABLE.block_n else 1) * (0.7 + 0.1 * options.num_stages))
    assert (found.best.block_n, found.best.num_stages) == (2 * TABLE.block_n, TABLE.num_stages - 1)
    assert len(found.trials) == 2 + len(tune_space.neighbours(Phase.PREFILL, TABLE, SHAPE))


def test_the_table_stays_where_all_others_are_within_the_noise() -> None:
    assert find(lambda options: 1.0 if options == TABLE else 0.95).best == TABLE


def test_the_table_stays_where_a_candidate_was_faster_only_once() -> None:
    seen: list[Options] = []

    def once(options: Options) -> float:
        seen.append(options)
        return 0.5 if options != TABLE and seen.count(options) == 1 and options.block_n > TABLE.block_n else 1.0

    assert find(once).best == TABLE


@pytest.mark.parametrize(("slow", "stays"), [(1.2, True), (1.0, False)])
def test_the_table_stays_where_a_candidate_is_slower_in_one_of_the_sizes(
    monkeypatch: pytest.MonkeyPatch, slow: float, stays: bool
) -> None:
    monkeypatch.setitem(tune_space._DECODE, "cpu", ((1, 32), (1, 48)))
    table = shipped(Phase.DECODE, SHAPE, LEAST_SHARED_MEMORY).few

    def timer(backend: Any, inputs: Inputs, _give_up_ms: float) -> float:
        if backend.options == table:
            return 1.0
        return 0.2 if inputs.batch.max_kv_len == 32 else slow

    found = search(FEW, bind=Imagined, timer=timer)
    assert found.sizes == ["1 x 32", "1 x 48"]
    assert (found.best == table) == stays


@pytest.mark.parametrize("longest", [1, 100], ids=["always", "in long sequences"])
def test_a_candidate_that_answers_wrongly_is_out_however_fast(longest: int) -> None:
    """Also one that the self-test, whose sequences are short, would let pass."""
    wrong = tune_space.neighbours(Phase.DECODE, shipped(Phase.DECODE, SHAPE, LEAST_SHARED_MEMORY).few, SHAPE)[0].options

    class Mutated(Imagined):
        def plan(self, batch: Batch) -> Any:
            self.longest = batch.max_kv_len
            return super().plan(batch)

        def run(self, *given: Any) -> Tensor:
            return super().run(*given) * (1.5 if self.options == wrong and self.longest >= longest else 1.0)

    found = find(lambda options: 0.1 if options == wrong else 1.0, FEW, Mutated)
    assert found.best == found.table.options
    (out,) = [trial for trial in found.trials if trial.problem]
    assert out.options == wrong and out.times_ms == [] and "allowed are" in out.problem


def test_a_candidate_that_does_not_compile_is_out_with_the_reason() -> None:
    def refuse(phase: Phase, shape: Shape, choice: Choice) -> Imagined:
        if choice.few.num_warps != TABLE.num_warps:
            raise RuntimeError("out of resource:\n shared memory")
        return Imagined(phase, shape, choice)

    found = find(lambda options: 1.0 if options == TABLE else 0.5 + options.num_stages / 100, bind=refuse)
    assert found.best.num_warps == TABLE.num_warps and found.best != TABLE
    problems = {trial.problem for trial in found.trials if trial.options.num_warps != TABLE.num_warps}
    assert problems == {"RuntimeError: out of resource: shared memory"}


def test_shipped_options_that_answer_wrongly_are_an_error() -> None:
    class Wrong(Imagined):
        def run(self, *given: Any) -> Tensor:
            return super().run(*given) * 1.5

    with pytest.raises(BackendError, match="triton's shipped options answer wrongly in prefill: "):
        find(lambda _: 1.0, bind=Wrong)


def test_no_candidate_begins_when_the_seconds_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 2.0)
    found = search(PREFILL, seconds=5.0, bind=Imagined, timer=clock.timer)
    assert clock.now == 6.0 and found.seconds == 6.0  # the table, one that began in time, one that ended late
    all_candidates = len(tune_space.neighbours(Phase.PREFILL, TABLE, SHAPE))
    assert found.untried == all_candidates - 2 and len(found.trials) == 3


def test_a_start_searches_no_longer_than_its_own_seconds_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, given = Clock(monkeypatch, 0.0), []
    said: list[str] = []
    monkeypatch.setattr(logger, "info", lambda text, *values: said.append(text % values))

    def slow(_: Wanted, *, seconds: float) -> Found:
        given.append(seconds)
        clock.now += 25.0
        return Found(TABLE, ["1 x 1"], [Trial(TABLE, [1.0])])

    monkeypatch.setattr(tune, "is_unknown", lambda _: True)
    monkeypatch.setattr(tune, "why_not", lambda *_: [])
    monkeypatch.setattr(tune, "search", slow)
    monkeypatch.setattr(tune, "keep", lambda _: None)
    windows = [replace(SHAPE, window=window) for window in (3, 5)]
    monkeypatch.setitem(tune.SEARCH_SECONDS, "cpu", 20.0)
    tune.tune_at_start([Phase.PREFILL, Phase.DECODE], windows, None, anew=True)
    assert given == [20.0, 20.0, 10.0]  # of six
    assert said == ["tuning triton for this device, once, for at most about 60 s"]


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 72, 128, 256])
def test_candidates_are_few_and_unlike_and_fit_into_memory(phase: Phase, dtype: torch.dtype, head_dim: int) -> None:
    shape = replace(make_shape(dtype=dtype), head_dim=head_dim)
    choice = shipped(phase, shape, LEAST_SHARED_MEMORY)
    for table in {choice.few, choice.many}:
        found = [candidate.options for candidate in tune_space.neighbours(phase, table, shape)]
        assert 3 <= len(found) <= tune_space.MOST_CANDIDATES and len({table, *found}) == 1 + len(found)
        for options in found:
            stored = options.block_m + 2 * options.block_n * options.num_stages
            assert stored * head_dim * dtype.itemsize <= LEAST_SHARED_MEMORY or options.num_stages == 1


def test_equal_runs_are_kept_only_by_candidates_that_take_no_more_room() -> None:
    """Programs that find none beside the others begin when these are over."""
    table = Options(0, 32, 1, 4, programs_per_sm=4, min_split=256, balanced_per_sm=8, runs=True)
    kept = {}
    for step in tune_space._decode_steps(table):
        options = tune_space.take(Phase.DECODE, table, step, make_shape(head_dim=32))
        assert options is not None
        kept[str(step)] = options.runs
        larger = any(value > getattr(table, name) for name, value in step.items() if name != "programs_per_sm")
        assert options.runs is not larger
    assert True in kept.values() and False in kept.values()


def test_few_and_many_sequences_are_searched_in_batches_that_get_their_options() -> None:
    """On an H200, with heads of Llama 3: MANY begins at 33 sequences."""
    assert parts(Phase.DECODE, SHAPE) == (Part.FEW, Part.MANY)
    assert parts(Phase.DECODE, replace(SHAPE, dtype=torch.float32)) == (Part.ALL,) == parts(Phase.PREFILL, SHAPE)
    for kv_heads, first_many in ((8, 33), (1, 264), (64, 5)):
        shape = replace(SHAPE, num_q_heads=64, num_kv_heads=kv_heads, device_type="cuda")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tune_space, "device_resources", lambda _: (132, 227 << 10))
            few, many = (tune_space.sizes_of(Phase.DECODE, part, shape) for part in (Part.FEW, Part.MANY))
        assert all(size.num_seqs < first_many for size in few) and all(size.num_seqs >= first_many for size in many)
    assert all(size.kv_len <= 7 for part in Part for size in tune_space.sizes_of(Phase.DECODE, part, SHAPE, 7))


@pytest.mark.parametrize(
    ("name", "capability", "unknown"),
    [
        ("NVIDIA H200", (9, 0), False),
        ("NVIDIA H100 80GB HBM3", (9, 0), False),
        ("NVIDIA H100-SXM", (9, 0), False),
        ("NVIDIA H20", (9, 0), True),
        ("NVIDIA A10", (8, 6), True),
        ("NVIDIA H200", (12, 0), True),
    ],
)
def test_a_start_searches_for_gpus_that_no_table_knows(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], unknown: bool
) -> None:
    monkeypatch.setattr(tune, "gpu_name", lambda _: name)
    assert tune.is_unknown(replace(SHAPE, device_type="cuda", capability=capability)) == unknown
    source = shipped(Phase.DECODE, replace(SHAPE, capability=capability), LEAST_SHARED_MEMORY, name).source
    assert source == ("options shipped for any GPU" if unknown else "options shipped for H200 and H100")
