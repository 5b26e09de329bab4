"""A load of several client processes is measured as one of a single process is."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fake_server import REFUSED_SEED, Answer, Fake
from online_replay import REPLAY, rows_of
from tessera.bench.online.benchmark import OnlineBenchmark
from tessera.bench.served import processes
from tessera.bench.served.client_process import Job
from tessera.bench.served.latency import failures, itl_ms, samples
from tessera.bench.served.load import Call, Dialect, Load, Reply
from tessera.bench.served.processes import measure, num_processes
from tessera.bench.served.targets import UrlTarget
from tessera.bench.statistics import percentile
from tessera.errors import ConfigError, TesseraError


def _job(url: str, number: int, *, gap_s: float = 0.02, max_tokens: int = 20, **more: Any) -> Job:
    fields = {"ignore_eos": True}
    calls = [Call(i, [1, 2, 3], max_tokens, i * gap_s, fields=fields | {"seed": i}) for i in range(number)]
    return Job(url, "fake", calls, 20, **more)


def _apart(pair: tuple[Reply, Answer]) -> float:
    """How much longer the client says the first token took than the server does, in seconds."""
    reply, answer = pair
    return reply.token_s[0] - reply.sent_s - (answer.tokens[0] - answer.came)


def _gaps(answer: Answer) -> list[float]:
    return [b - a for a, b in zip(answer.tokens, answer.tokens[1:])]


def test_medians_of_two_processes_are_within_2_percent_of_what_the_server_did(fake: Fake) -> None:
    """As of one process, see test_client.py: of one load of a few, the quarter that a busy machine disturbed least."""
    for attempt in range(8):
        load = measure(_job(fake.url("steady"), 16, gap_s=0.1), 2)
        answers = fake.record("steady")
        assert not failures(load) and load.num_processes == 2
        calm = sorted(zip(load.replies, answers, strict=True), key=_apart)[:4]
        truth = {
            "ttft_ms": percentile([1000 * (each.tokens[0] - each.came) for _, each in calm], 50),
            "tpot_ms": percentile([1000 * (each.tokens[-1] - each.tokens[0]) / 19 for _, each in calm], 50),
            "itl_ms": percentile(
                [1000 * (b - a) for each in answers for a, b in zip(each.tokens, each.tokens[1:])], 50
            ),
        }
        found = samples(Load([reply for reply, _ in calm], load.seconds, 0, 0))
        measured = {name: percentile(found[name], 50) for name in ("ttft_ms", "tpot_ms")}
        measured["itl_ms"] = percentile([gap for reply in load.replies for gap in itl_ms(reply)], 50)
        if measured == pytest.approx(truth, rel=0.02) or attempt == 7:
            break
    assert measured == pytest.approx(truth, rel=0.02)
    assert 0 < load.client_cpu < load.client_cpu_total and load.lag_s == max(r.sent_s - r.due_s for r in load.replies)
    assert [reply.index for reply in load.replies] == list(range(16)), "in the order of the calls"
    began = [each.came - reply.sent_s for reply, each in zip(load.replies, answers, strict=True)]
    assert abs(min(began[::2]) - min(began[1::2])) < 0.01, "both count from one moment"


def test_an_open_loop_is_dealt_by_turns_in_order_of_time() -> None:
    calls = [Call(i, [1], 1, at_s) for i, at_s in enumerate((0.3, 0.0, 0.2, 0.1))]
    shares = processes._dealt(Job("http://h/v1", "m", calls, 1.0), 2)
    assert [[call.at_s for call in share.calls] for share in shares] == [[0.0, 0.2], [0.1, 0.3]]


def test_a_closed_loop_is_dealt_by_places() -> None:
    shares = processes._dealt(_job("http://h/v1", 7, concurrency=3), 2)
    assert [(share.concurrency, [call.index for call in share.calls]) for share in shares] == [
        (2, [0, 2, 3, 5, 6]),
        (1, [1, 4]),
    ]


def test_a_closed_loop_keeps_its_number_in_flight_all_processes_together(fake: Fake) -> None:
    load = measure(_job(fake.url("steady"), 9, max_tokens=5, concurrency=3), 2)
    answers = fake.record("steady")
    assert not failures(load) and [reply.index for reply in load.replies] == list(range(9)) and len(answers) == 9
    at = sorted([(each.came, 1) for each in answers] + [(each.ended, -1) for each in answers])
    assert max(sum(step for _, step in at[: i + 1]) for i in range(len(at))) == 3
    first = sorted(reply.sent_s for reply in load.replies)[:3]
    assert first[2] - first[0] < 0.05, "all start together"


def test_failures_in_any_process_are_failures_of_the_load(fake: Fake) -> None:
    job = _job(fake.url("quick"), 4)
    job.calls[3] = Call(3, [1], 20, 0.06, fields={"seed": REFUSED_SEED})
    assert failures(measure(job, 2)).startswith("1 of 4 requests failed: 1x HTTP 500: ")
    fake.record("quick")
    assert "2x the connection broke" in failures(measure(_job(fake.url("drop"), 2), 2))
    fake.record("drop")


def test_what_a_server_refuses_one_process_is_known_to_the_next_load(fake: Fake) -> None:
    fake.record("refused")
    dialect = Dialect()
    assert not failures(measure(_job(fake.url("refuses"), 4), 2, dialect)) and not dialect.usage_per_chunk
    refused = len(fake.record("refused"))
    assert refused and not failures(measure(_job(fake.url("refuses"), 4), 2, dialect))
    assert not fake.record("refused") and fake.record("refuses")


def test_a_process_that_ends_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(TesseraError, match="a process of the client ended with exit code 3"):
        measure(_job("http://127.0.0.1:9/v1", 2), 2)


def test_a_process_with_another_clock_is_refused(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a system would have it whose processes count from their own starts."""
    assert time.get_clock_info("perf_counter").monotonic
    original = msgspec.msgpack.decode

    def decode(data: bytes, **kind: Any) -> Any:
        return 0.5 if kind["type"] is float else original(data, **kind)

    monkeypatch.setattr(msgspec.msgpack, "decode", decode)
    with pytest.raises(TesseraError, match="has another clock: "):
        measure(_job(fake.url("quick"), 2), 2)


@pytest.mark.parametrize(
    ("cores", "number", "gap_s", "concurrency", "chosen"),
    [
        (2, 256, 0.0, 256, 1),
        (16, 256, 0.0, 256, 4),
        (64, 256, 0.0, 256, 8),
        (64, 33, 0.0, 33, 2),
        (64, 32, 0.0, 32, 1),
        (16, 100, 0.01, None, 4),
        (16, 100, 0.02, None, 2),
        (16, 100, 1.0, None, 1),
    ],
)
def test_left_out_the_number_follows_load_and_cores(
    cores: int, number: int, gap_s: float, concurrency: int | None, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "num_cores", lambda: cores)
    assert num_processes(0, _job("", number, gap_s=gap_s).calls, concurrency) == chosen


def test_the_rows_of_a_replay_say_how_many_processes_sent_it(fake: Fake) -> None:
    for asked, number in ((0, 1), (2, 2)):
        asking = OnlineBenchmark(
            [UrlTarget("a", fake.url("quick"))], replace(REPLAY, client_processes=asked, scales=[0.5]), repeats=1
        )
        [row] = rows_of(asking)
        assert row.status == "ok" and row.metrics["client_processes"] == number
        assert row.conditions.settings["client_processes"] == (asked or "by load and cores")
        fake.record("quick")
    with pytest.raises(ConfigError, match="5 is more than the"):
        replace(REPLAY, client_processes=5)
