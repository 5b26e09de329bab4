"""Auto by measurement: the faster wins whatever the order, and the others are told why."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from known_speeds import SIZED, SMALL, Fast, Hopeless, Slow, Wrong, build
from tessera.attention import cache, measure, registry
from tessera.attention import choose as choosing
from tessera.attention.backends.naive import Naive
from tessera.attention.choose import table_lines
from tessera.attention.contract import AttentionBackend, Phase
from tessera.attention.measure import Measured, buckets_for
from tessera.attention.step import Bucket
from tessera.attention.timing import make_inputs, time_call
from tessera.attention.workloads import make_batch
from tessera.errors import BackendError
from tessera.types import AttentionBucket

pytestmark = pytest.mark.usefixtures("folder")


def time_in(phase: Phase, *candidates: type[AttentionBackend[Any]]) -> Measured:
    return measure.measure(phase, candidates, {SIZED: 2}, SMALL)


def test_the_faster_wins_whatever_the_order_and_the_others_are_told_why() -> None:
    attention, choices = build()
    for phase in (Phase.PREFILL, Phase.DECODE):
        choice = choices[phase]
        assert (choice.backend, choice.reason) == ("fast", "auto: measured")
        assert [bucket.size for bucket in choice.buckets] == ["2 x 40", "1 x 20"]
        for bucket in choice.buckets:
            assert (bucket.backend, bucket.runner_up) == ("fast", "slow")
            assert list(bucket.times_ms) == ["fast", "slow"] and bucket.times_ms["slow"] > 10
        assert choice.rejected["slow"][0].startswith("measured: ")
        assert choice.rejected["wrong"][0].startswith("fails its self-test: error")
        assert choice.rejected["unsteady"] == ["does not promise the same bits whatever else is in the batch"]
        assert [backend.name for backend in attention.bound(phase)[0]] == ["fast"]
        assert any("fast before slow" in line for line in table_lines(choice))


def test_a_rung_of_the_ladder_is_never_chosen_and_serves_who_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (registry, choosing, cache):
        monkeypatch.setitem(module.BACKENDS, "rung", "known_speeds:Rung")
    for measure_mode in ("force", "off"):
        monkeypatch.setattr(choosing, "AUTO", dict.fromkeys(Phase, ("rung", "fast")))
        _, choices = build(attention_measure=measure_mode)
        for choice in choices.values():
            assert choice.backend == "fast"
            assert choice.rejected["rung"] == ["a rung of the ladder, an idea: to be compared, not chosen"]
    assert {choice.backend for choice in build(attention="rung")[1].values()} == {"rung"}


def test_who_takes_too_long_is_called_once_more_after_the_first() -> None:
    calls: list[int] = []

    class Counted(Naive):
        def run(self, *arguments: Any) -> torch.Tensor:
            calls.append(1)
            time.sleep(0.002)
            return super().run(*arguments)

    inputs = make_inputs(Phase.DECODE, SIZED, SMALL[0])
    time_call(Counted(Phase.DECODE, SIZED), inputs, give_up_ms=1.0)
    assert len(calls) == 2
    time_call(Counted(Phase.DECODE, SIZED), inputs, repeats=5)
    assert len(calls) == 2 + 6


def test_nobody_who_answers_right_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (Fast, Slow):
        monkeypatch.setattr(backend, "run", Wrong.run)
    with pytest.raises(BackendError, match="no attention backend passes for prefill\nslow: fails its self-test"):
        build()


def test_the_hopeless_is_timed_once_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.TIMING_SECONDS, "cpu", 60.0)
    Hopeless.calls = 0
    found = time_in(Phase.DECODE, Fast, Hopeless)
    assert {bucket.backend for bucket in found.buckets} == {"fast"}
    assert Hopeless.calls == 1 + 2 * len(SMALL)  # the self-test, then a first and a timed call for each size


def test_when_time_is_over_the_rest_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.SETUP_SECONDS, "cpu", 0.001)
    found = time_in(Phase.DECODE, Slow, Fast)
    assert {bucket.backend for bucket in found.buckets} == {"slow"}
    assert found.rejected == {"fast": ["not timed: the time for measuring was over"]}


def test_no_size_is_longer_than_a_sequence_may_become(monkeypatch: pytest.MonkeyPatch) -> None:
    assert buckets_for(Phase.DECODE, "cpu", 20) == [Bucket(1, 1, 20)]
    assert buckets_for(Phase.DECODE, "cpu", 7) == [Bucket(1, 1, 7)]
    assert buckets_for(Phase.PREFILL, "cpu", 7) == [Bucket(1, 7, 7)]
    monkeypatch.undo()
    assert all(bucket.kv_len <= 4096 for bucket in buckets_for(Phase.DECODE, "cuda", 4096))


def test_on_a_gpu_each_size_has_its_winner_but_few_libraries_where_times_are_alike() -> None:
    times = {
        Bucket(1, 1, 512): {"a": 1.0, "b": 2.0},
        Bucket(8, 1, 512): {"a": 3.0, "b": 2.0},
        Bucket(64, 1, 512): {"a": 1.0, "b": 2.0},
        Bucket(256, 1, 512): {"a": 1.02, "b": 1.0, "c": 1.5},
    }
    found = measure._conclude(times, ["c", "a", "b"], {"d": ["no GPU"]}, "cuda")
    assert [bucket.backend for bucket in found.buckets] == ["a", "b", "a", "a"]
    assert found.rejected == {"d": ["no GPU"], "c": ["measured: 1.47 to 1.47 times as long"]}
    on_cpu = measure._conclude(times, ["c", "a", "b"], {}, "cpu")
    assert {bucket.backend for bucket in on_cpu.buckets} == {"a"}


def test_a_step_goes_to_the_nearest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {Bucket(1, 1, 512): "fast", Bucket(64, 1, 512): "slow", Bucket(64, 1, 4096): "fast"}
    buckets = [AttentionBucket(b.label, *b, name, None, {name: 1.0}) for b, name in sizes.items()]
    monkeypatch.setattr(choosing, "measure", lambda *_: Measured(buckets))
    attention, choices = build()
    assert choices["decode"].backends == ["fast", "slow"]

    def serves(num_seqs: int, kv_len: int) -> str:
        (backend,) = attention.serving(Phase.DECODE, Bucket(num_seqs, 1, kv_len))
        return backend.name

    assert [serves(1, 512), serves(7, 512), serves(8, 512), serves(9, 512)] == ["fast", "fast", "fast", "slow"]
    assert [serves(64, 700), serves(64, 1448), serves(64, 1449), serves(300, 9000)] == ["slow", "slow", "fast", "fast"]
    assert [serves(1, 1), serves(100, 1)] == ["fast", "slow"]

    planned: list[str] = []
    for backend in (Fast, Slow):
        monkeypatch.setattr(backend, "plan", lambda self, _: planned.append(self.name))
    batch = make_batch(((1, 500),) * 60, torch.zeros(60, 32, dtype=torch.int32), 1)
    attention.begin_step([], [], torch.zeros(60, dtype=torch.int64), {Phase.DECODE: (slice(0, 60), batch)})
    assert planned == ["slow"]


def test_a_last_resort_is_timed_where_nobody_else_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_LAST_RESORTS", {"cpu": ("fast",)})
    for choice in build(attention_measure="force")[1].values():
        assert choice.backend == "slow"
        assert choice.rejected["fast"] == ["not timed: a last resort here, and others can serve"]
    monkeypatch.setattr(choosing, "AUTO", dict.fromkeys(Phase, ("wrong", "fast")))
    for module in (registry, choosing, cache):
        monkeypatch.delitem(module.BACKENDS, "slow", raising=False)
    for choice in build(attention_measure="force")[1].values():
        assert choice.backend == "fast"
        assert choice.rejected["wrong"][0].startswith("fails its self-test")
