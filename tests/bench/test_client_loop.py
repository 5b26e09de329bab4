"""The client is on time, tells how far it was not, and does nothing while a load runs that can wait."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import pytest

from fake_server import Fake
from tessera.bench.served.client import Client
from tessera.bench.served.http import Answer, Connection
from tessera.bench.served.load import Call
from tessera.bench.served.loop import WATCH_SECONDS, run, sleep_until, watch
from tessera.bench.served.stream import Stream


def _calls(number: int, *, max_tokens: int = 20) -> list[Call]:
    return [Call(i, [1, 2, 3], max_tokens, 0.02 * i, fields={"ignore_eos": True, "seed": i}) for i in range(number)]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere asyncio's own selector is as fine")
def test_a_wait_is_not_rounded_up_to_a_millisecond() -> None:
    """The shortest of many, as a busy machine wakes nobody in time; epoll's own never end before 1 ms."""

    async def waits() -> list[float]:
        found = []
        for _ in range(300):
            began = time.perf_counter()
            await sleep_until(began + 0.0002)
            found.append(time.perf_counter() - began)
        return found

    assert 0.0002 <= min(run(waits())) < 0.0009


def test_a_loop_that_was_held_up_counts_as_late_for_all_of_that_time() -> None:
    async def held_up() -> list[float]:
        late: list[float] = []
        watcher = asyncio.create_task(watch(time.perf_counter(), late))
        await asyncio.sleep(0.02)
        time.sleep(0.2)
        await asyncio.sleep(0.02)
        watcher.cancel()
        return late

    late = run(held_up())
    num_held = sum(each > 0.05 for each in late)
    assert num_held >= 0.75 * 0.15 / WATCH_SECONDS and max(late) > 0.15


def test_answers_are_looked_into_when_all_have_ended(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for what, kind in (("read", Answer), ("look", Stream)):

        def feed(self: Any, data: bytes, now: float, what: str = what, original: Any = kind.feed) -> None:
            done.append(what)
            original(self, data, now)

        monkeypatch.setattr(kind, "feed", feed)
    load = run(Client(fake.url("steady"), "fake", timeout_s=10).open_loop(_calls(5)))
    fake.record("steady")
    assert not load.failed and "read" not in done[done.index("look") :] and done.count("read") > 20


def test_answers_too_many_to_be_held_are_looked_into_at_their_ends(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.bench.served.client.MAX_HELD_BYTES", -1)
    looked: list[float] = []
    original = Stream.problem

    def problem(self: Stream, num_tokens: int | None) -> str:
        looked.append(time.perf_counter())
        return original(self, num_tokens)

    monkeypatch.setattr(Stream, "problem", problem)
    for is_open in (True, False):
        client = Client(fake.url("steady"), "fake", timeout_s=10)
        load = run(client.open_loop(_calls(5)) if is_open else client.closed_loop(_calls(5, max_tokens=3), 1))
        ended = max(each.ended for each in fake.record("steady"))
        assert not load.failed and [reply.index for reply in load.replies] == list(range(5))
        assert min(looked) < ended
        looked.clear()
    assert len(load.replies[0].token_s) == 3


def test_connections_are_made_before_their_calls_are_due(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten calls at one moment have ten connections by then. Of a few tries one: a busy machine may make them late."""
    done: list[str] = []
    made, exchange = Connection.connection_made, Connection.exchange

    def connection_made(self: Connection, transport: asyncio.BaseTransport) -> None:
        done.append("made")
        made(self, transport)

    async def sent(self: Connection, request: bytes, answer: Answer) -> None:
        done.append(request[:4].decode())
        await exchange(self, request, answer)

    monkeypatch.setattr(Connection, "connection_made", connection_made)
    monkeypatch.setattr(Connection, "exchange", sent)
    calls = [Call(i, [1, 2, 3], 2, 0.0, fields={"seed": i}) for i in range(10)]
    for _ in range(5):
        done.clear()
        run(Client(fake.url("quick"), "fake", timeout_s=10).open_loop(calls))
        fake.record("quick")
        if "made" not in done[done.index("POST") :]:
            break
    assert done == ["made", "GET "] + ["made"] * 9 + ["POST"] * 10
