"""What `/metrics` says is what the clients of a real server saw, in a form that Prometheus' own parser reads."""

from __future__ import annotations

import socket
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server_process import ServerProcess, wait_for
from tessera import __version__
from tessera.server import ipc
from tessera.server.app import build_app
from tessera.server.engine_client import EngineClient
from tessera.server.latency import Histogram, Latency
from tessera.text.tokenizer import Tokenizer
from tessera.types import EngineStatus, FinishReason, Output
from test_waiting_outputs import generation_of, with_client

BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 6, "ignore_eos": True, "temperature": 0}


def read(server: ServerProcess) -> dict[tuple[str, ...], float]:
    """Each sample by its name without `tessera_` and the values of its labels, in order of their names."""
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    assert all(sample.name.startswith("tessera_") for sample in samples)
    found: dict[tuple[str, ...], float] = defaultdict(float)
    for sample in samples:
        labels = [sample.labels[name] for name in sorted(sample.labels)]
        found[sample.name.removeprefix("tessera_"), *labels] = sample.value
    return found


def grown_since(before: dict[tuple[str, ...], float], server: ServerProcess) -> dict[tuple[str, ...], float]:
    """By how much each sample has grown."""
    return defaultdict(float, {key: value - before[key] for key, value in read(server).items()})


def test_the_engine_its_model_and_the_backend_of_each_phase_are_told(server: ServerProcess) -> None:
    found = read(server)
    assert found["pages_total",] >= found["pages_free",] > 0 and found["engine_up",] == 1
    served = server.http.get("/v1/attention").json()
    backends = {phase: choice["backend"] for phase, choice in served["phases"].items()}
    expected = {key: served[key] for key in ("device", "dtype", "model")} | backends | {"version": __version__}
    assert found["engine_info", *[expected[name] for name in sorted(expected)]] == 1


def test_tokens_and_their_latencies_are_as_a_client_counts_them(server: ServerProcess) -> None:
    server.wait_until_idle()
    before, begun = read(server), time.monotonic()
    assert server.post("/v1/completions", BODY | {"n": 2}).status_code == 200
    assert server.post("/v1/completions", BODY | {"max_tokens": 1}).status_code == 200
    stopped = server.post("/v1/completions", BODY | {"max_tokens": 50, "stop": ["e"]}).json()
    assert stopped["choices"][0]["finish_reason"] == "stop"
    num_tokens = stopped["usage"]["completion_tokens"]
    seconds, grown = time.monotonic() - begun, grown_since(before, server)
    assert grown["sequences_finished_total", "length"] == 3 and grown["sequences_finished_total", "stop"] == 1
    assert grown["time_to_first_token_seconds_count",] == grown["sequence_seconds_count",] == 4
    assert grown["inter_token_seconds_count",] >= 10 + num_tokens - 1, "and what was computed before it was stopped"
    assert 0 < grown["time_to_first_token_seconds_sum",] < grown["sequence_seconds_sum",] < 4 * seconds
    waited = grown["time_to_first_token_seconds_sum",] + grown["inter_token_seconds_sum",]
    assert waited == pytest.approx(grown["sequence_seconds_sum",], rel=1e-6)
    assert grown["http_responses_total", "/v1/completions", "200"] == 3


def test_a_sequence_whose_client_leaves_is_an_abort(server: ServerProcess) -> None:
    server.wait_until_idle()
    before = read(server)["sequences_finished_total", "abort"]
    with server.http.stream("POST", "/v1/completions", json=BODY | {"max_tokens": 1500, "stream": True}) as answer:
        next(answer.iter_lines())
    wait_for(lambda: read(server)["sequences_finished_total", "abort"] == before + 1)


def test_errors_are_counted_by_status_and_unknown_paths_as_one(server: ServerProcess) -> None:
    before = read(server)
    assert server.post("/v1/completions", {"prompt": 3}).status_code == 400
    for place in range(3):
        assert server.http.get(f"/nothing/{place}").status_code == 404
    grown = grown_since(before, server)
    assert grown["http_responses_total", "/v1/completions", "400"] == 1
    assert grown["http_responses_total", "other", "404"] == 3
    assert grown["http_responses_total", "/metrics", "200"] == 1, "the reading before, which this one does not count"


def test_a_missing_key_is_counted_too(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--api-key", "k", scripted=True)
    assert server.http.get("/metrics").status_code == 401
    server.http.headers["authorization"] = "Bearer k"
    assert read(server)["http_responses_total", "/metrics", "401"] == 1


def test_a_client_that_leaves_before_its_answer_is_a_499(server: ServerProcess) -> None:
    before = read(server)["http_responses_total", "/v1/completions", "499"]
    with pytest.raises(httpx2.ReadTimeout):
        server.http.post("/v1/completions", json=BODY | {"max_tokens": 1500}, timeout=0.5)
    wait_for(lambda: read(server)["http_responses_total", "/v1/completions", "499"] == before + 1)


def test_a_client_that_leaves_within_its_body_is_a_499(server: ServerProcess) -> None:
    before, address = read(server)["http_responses_total", "/tokenize", "499"], urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as leaving:
        leaving.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
    wait_for(lambda: read(server)["http_responses_total", "/tokenize", "499"] == before + 1)


def test_an_unexpected_failure_is_counted_as_a_500() -> None:
    latency = Latency()

    def problem() -> str | None:
        raise ValueError("what nobody foresaw")

    service: Any = SimpleNamespace(client=SimpleNamespace(latency=latency, problem=problem))
    with TestClient(build_app(service), raise_server_exceptions=False) as http:
        assert http.get("/health").status_code == 500
    assert latency.responses == {("/health", 500): 1}


def latency_after(act: Callable[[EngineClient], None]) -> Latency:
    """What is counted of one sequence that ends at its length, where `act` is the engine."""
    found: list[Latency] = []

    async def run(client: EngineClient, tokenizer: Tokenizer, _sent: list[ipc.ToEngine]) -> None:
        with generation_of(client, tokenizer) as generation:
            act(client)
            _ = [piece async for piece in generation.pieces()]
        found.append(client.latency)

    with_client(run)
    assert +found[0].finished == {"length": 1}
    return found[0]


def say(client: EngineClient, at: float, *token_ids: int, finish: FinishReason | None = None) -> None:
    client._take(ipc.Report(EngineStatus(), [Output("r", 0, list(token_ids), finish_reason=finish)], at))


def test_times_are_those_of_the_engine_however_late_its_reports_are_read() -> None:
    """Tokens of one step share the time since the last."""

    def act(client: EngineClient) -> None:
        now = time.monotonic()
        say(client, now + 3, 1)
        say(client, now + 3.04, 1, 2, 3, 4)
        say(client, now + 3.05, finish="length")

    latency = latency_after(act)
    at_10_ms = latency.inter_token.bounds.index(0.01)
    assert sum(latency.inter_token.counts) == sum(latency.inter_token.counts[at_10_ms : at_10_ms + 2]) == 4
    assert latency.inter_token.total == pytest.approx(0.04)
    assert sum(latency.first_token.counts) == 1 and latency.first_token.total == pytest.approx(3, abs=0.1)
    assert latency.sequence.total == pytest.approx(3.05, abs=0.1)


def test_a_sequence_without_tokens_ends_when_its_prompt_is_computed() -> None:
    latency = latency_after(lambda client: say(client, time.monotonic() + 2, finish="length"))
    assert not sum(latency.first_token.counts) and not sum(latency.inter_token.counts)
    assert latency.sequence.total == pytest.approx(2, abs=0.1) and sum(latency.sequence.counts) == 1


def test_a_stop_string_in_the_last_tokens_counts_as_its_reply_says() -> None:
    async def run(client: EngineClient, tokenizer: Tokenizer, _sent: list[ipc.ToEngine]) -> None:
        ids = tokenizer.encode("one two three")
        with generation_of(client, tokenizer, stop=[" three"]) as generation:
            say(client, time.monotonic(), *ids, finish="length")
            assert [piece.finish_reason async for piece in generation.pieces()] == ["stop"]
        assert client.latency.finished == {"stop": 1, "abort": 0}

    with_client(run)


def test_a_histogram_counts_up_to_and_with_its_bounds() -> None:
    histogram = Histogram((0.1, 0.5))
    for seconds in (0.05, 0.1, 0.10001, 0.5, 7):
        histogram.add(seconds)
    histogram.add(0.2, 3)
    assert histogram.counts == [2, 5, 1] and histogram.total == pytest.approx(8.35001)
