"""Auto by measurement: the faster wins, the result is kept under all it depends on, who is named is not timed."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from attention_cases import make_shape
from tessera.attention import cache, measure, prove, registry
from tessera.attention import choose as choosing
from tessera.attention.backends.naive import Naive
from tessera.attention.choose import build_attention, table_lines
from tessera.attention.contract import AttentionBackend, Limits, Phase
from tessera.attention.measure import Measured, buckets_for
from tessera.attention.step import Attention, Bucket
from tessera.attention.timing import make_inputs, time_call
from tessera.attention.workloads import make_batch
from tessera.config import AttentionConfig
from tessera.errors import BackendError
from tessera.types import AttentionBucket, AttentionChoice

SHAPE = make_shape(page_size=None)
SIZED = replace(SHAPE, page_size=16)
STEADY = {phase: replace(limits, batch_invariant=("cpu",)) for phase, limits in Naive.limits.items()}
SMALL = [Bucket(2, 1, 40), Bucket(1, 1, 20)]


class Fast(Naive):
    name: ClassVar[str] = "fast"
    limits: ClassVar[dict[Phase, Limits]] = STEADY


class Slow(Fast):
    name: ClassVar[str] = "slow"
    needs: ClassVar[tuple[str, ...]] = ()

    def run(self, *arguments: Any) -> torch.Tensor:
        time.sleep(0.01)
        return super().run(*arguments)


class Hopeless(Fast):
    """So slow that nobody waits for it twice."""

    name: ClassVar[str] = "hopeless"
    calls: ClassVar[int] = 0

    def run(self, *arguments: Any) -> torch.Tensor:
        Hopeless.calls += 1
        time.sleep(0.5)
        return super().run(*arguments)


class Wrong(Fast):
    name: ClassVar[str] = "wrong"

    def run(self, *arguments: Any) -> torch.Tensor:
        return super().run(*arguments) * 1.1


class Rung(Fast):
    """As fast, preferred, and there to be compared."""

    name: ClassVar[str] = "rung"
    rung: ClassVar[str | None] = "an idea"


class Unsteady(Fast):
    name: ClassVar[str] = "unsteady"
    limits: ClassVar[dict[Phase, Limits]] = Naive.limits


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Backends of known speed in the place of ours, and an empty cache."""
    ours = {backend.name: f"{__name__}:{backend.__name__}" for backend in (Slow, Fast, Wrong, Unsteady)}
    for module in (registry, choosing, cache):
        monkeypatch.setattr(module, "BACKENDS", ours)
    monkeypatch.setattr(choosing, "AUTO", dict.fromkeys(Phase, ("slow", "fast")))
    monkeypatch.setattr(measure, "BUCKETS", {("cpu", phase): SMALL for phase in Phase})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tessera" / "attention"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Phase]:
    """The phases that were timed since."""
    phases: list[Phase] = []
    real = measure.measure

    def counted(phase: Phase, *arguments: Any) -> Measured:
        phases.append(phase)
        return real(phase, *arguments)

    monkeypatch.setattr(choosing, "measure", counted)
    return phases


def build(**settings: Any) -> tuple[Attention, dict[str, AttentionChoice]]:
    attention, _, choices = build_attention(AttentionConfig(**settings), [SHAPE, SHAPE], None)
    return attention, {choice.phase: choice for choice in choices}


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
        monkeypatch.setitem(module.BACKENDS, "rung", f"{__name__}:Rung")
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


def test_what_was_measured_is_read_back_fast_and_alike(timed: list[Phase]) -> None:
    _, first = build()
    started = time.perf_counter()
    _, second = build()
    assert time.perf_counter() - started < 0.5  # 0.02 s on a machine that does nothing else
    assert timed == [Phase.PREFILL, Phase.DECODE]
    for phase, choice in second.items():
        assert choice == replace(first[phase], reason="auto: measured before")


def test_reading_a_measurement_takes_less_than_a_tenth_of_a_second() -> None:
    build()
    key = cache.make_key(Phase.DECODE, {SIZED: 2}, SMALL)
    started = time.process_time()
    assert cache.read(key) is not None
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize("damage", ["", "{", "\xff", '{"key": {}, "found": {"buckets": []}}', '{"key": 3}'])
def test_a_damaged_measurement_is_made_anew_and_said(
    folder: Path, timed: list[Phase], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    build()
    for path in folder.iterdir():
        path.write_text(damage, encoding="latin-1")
    with caplog.at_level(logging.WARNING, logger="tessera"):
        logging.getLogger("tessera").addHandler(caplog.handler)
        _, choices = build()
        logging.getLogger("tessera").removeHandler(caplog.handler)
    assert choices["decode"].reason == "auto: measured" and len(timed) == 4
    assert "made anew" in caplog.text
    build()
    assert len(timed) == 4


def test_a_file_of_another_key_is_not_believed(folder: Path, timed: list[Phase]) -> None:
    """As after a collision, or a copy by hand."""
    build()
    for path in folder.iterdir():
        stored = json.loads(path.read_text())
        stored["key"]["device"] = "another"
        path.write_text(json.dumps(stored))
    build()
    assert len(timed) == 4


def test_the_key_changes_with_everything_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(phase: Phase = Phase.DECODE, shape: Any = SIZED, count: int = 2) -> str:
        return str(cache.make_key(phase, {shape: count}, SMALL))

    keys = [
        key(),
        key(Phase.PREFILL),
        key(shape=replace(SIZED, head_dim=64)),
        key(shape=replace(SIZED, dtype=torch.bfloat16)),
        key(shape=replace(SIZED, page_size=32)),
        key(shape=replace(SIZED, window=9)),
        key(count=3),
    ]
    assert key() == keys[0]
    for module, name, value in (
        (prove, "version", lambda package: f"{package} 999"),
        (cache, "machine", lambda _: {"device": "another processor"}),
        (cache, "code_digest", lambda _: "another"),
        (torch, "get_num_threads", lambda: 77),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, value)
            keys.append(key())
    monkeypatch.setattr(torch, "__version__", "99.0")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_force_measures_anew_and_off_not_at_all(timed: list[Phase]) -> None:
    build()
    build(attention_measure="force")
    assert len(timed) == 4
    _, choices = build(attention_measure="off")
    assert len(timed) == 4
    assert choices["decode"].backend == "slow"  # it stands first
    assert choices["decode"].buckets == []


def test_a_named_backend_is_neither_timed_nor_overridden(timed: list[Phase]) -> None:
    _, choices = build(attention="slow")
    assert timed == [] and {choice.backend for choice in choices.values()} == {"slow"}
    _, choices = build(decode_attention="slow", attention_measure="force")
    assert timed == [Phase.PREFILL]
    assert (choices["prefill"].backend, choices["decode"].backend) == ("fast", "slow")
    assert choices["decode"].reason == "named"


def test_a_folder_that_cannot_be_written_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, timed: list[Phase]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build()[1]["decode"].backend == "fast"
    build()
    assert len(timed) == 4


def test_a_kept_winner_that_can_no_longer_serve_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, timed: list[Phase]
) -> None:
    build()
    monkeypatch.setattr(Fast, "needs", ("no_such_module",))
    choice = build()[1]["decode"]
    assert (choice.backend, choice.reason) == ("slow", "auto: the only one it may take here")
    assert len(timed) == 4


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
