"""What `/metrics` says is what the clients of a real server saw, in a form that Prometheus' own parser reads."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server_process import ServerProcess, wait_for
from tessera import __version__
from tessera.server import ipc
from tessera.server.engine_client import EngineClient
from tessera.server.latency import Histogram
from tessera.text.tokenizer import Tokenizer
from tessera.types import Output
from test_waiting_outputs import generation_of, report, with_client

BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 6, "ignore_eos": True, "temperature": 0}


def read(server: ServerProcess) -> Counter[tuple[str, ...]]:
    """Each sample by its name without `tessera_` and the values of its labels, in order of their names."""
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    assert all(sample.name.startswith("tessera_") for sample in samples)
    found: Counter[tuple[str, ...]] = Counter()
    for sample in samples:
        labels = [sample.labels[name] for name in sorted(sample.labels)]
        found[sample.name.removeprefix("tessera_"), *labels] = sample.value  # type: ignore[assignment]
    return found


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
    assert server.post("/v1/completions", BODY | {"stream": True, "stop": ["upon", ","]}).status_code == 200
    seconds, grown = time.monotonic() - begun, read(server)
    grown.subtract(before)
    assert grown["sequences_finished_total", "length"] + grown["sequences_finished_total", "stop"] == 4
    assert grown["sequences_finished_total", "length"] >= 3
    assert grown["time_to_first_token_seconds_count",] == grown["sequence_seconds_count",] == 4
    assert 10 <= grown["inter_token_seconds_count",] <= 15, "two of 6 tokens, and one of 6 or fewer"
    assert 0 < grown["time_to_first_token_seconds_sum",] < grown["sequence_seconds_sum",] < 4 * seconds
    waited = grown["time_to_first_token_seconds_sum",] + grown["inter_token_seconds_sum",]
    assert waited == pytest.approx(grown["sequence_seconds_sum",], rel=1e-6)
    assert grown["http_responses_total", "/v1/completions", "200"] == 3


def test_a_sequence_whose_client_leaves_is_an_abort(server: ServerProcess) -> None:
    before = read(server)["sequences_finished_total", "abort"]
    with server.http.stream("POST", "/v1/completions", json=BODY | {"max_tokens": 1500, "stream": True}) as answer:
        next(answer.iter_lines())
    wait_for(lambda: read(server)["sequences_finished_total", "abort"] == before + 1)


def test_errors_are_counted_by_status_and_unknown_paths_as_one(server: ServerProcess) -> None:
    before = read(server)
    assert server.post("/v1/completions", {"prompt": 3}).status_code == 400
    for place in range(3):
        assert server.http.get(f"/nothing/{place}").status_code == 404
    grown = read(server)
    grown.subtract(before)
    assert grown["http_responses_total", "/v1/completions", "400"] == 1
    assert grown["http_responses_total", "other", "404"] == 3
    assert grown["http_responses_total", "/metrics", "200"] == 1, "the reading before, which this one does not count"


def test_a_missing_key_is_counted_too(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--api-key", "k", scripted=True)
    assert server.http.get("/metrics").status_code == 401
    server.http.headers["authorization"] = "Bearer k"
    assert read(server)["http_responses_total", "/metrics", "401"] == 1


def test_tokens_of_one_step_share_the_time_since_the_last() -> None:
    async def test(client: EngineClient, tokenizer: Tokenizer, _sent: list[ipc.ToEngine]) -> None:
        latency = client.latency
        with generation_of(client, tokenizer):
            report(client, Output("r", 0, [1]))
            assert sum(latency.first_token.counts) == 1 and not sum(latency.inter_token.counts)
            begun = time.monotonic()
            time.sleep(0.04)
            report(client, Output("r", 0, [1, 2, 3, 4]))
            report(client, Output("r", 0, [], finish_reason="length"))
            assert sum(latency.inter_token.counts) == 4
            assert 0.04 <= latency.inter_token.total < time.monotonic() - begun + 0.01
            assert not any(latency.inter_token.counts[: latency.inter_token.bounds.index(0.01)]), "10 ms each"

    with_client(test)


def test_a_histogram_counts_up_to_and_with_its_bounds() -> None:
    histogram = Histogram((0.1, 0.5))
    for seconds in (0.05, 0.1, 0.10001, 0.5, 7):
        histogram.add(seconds)
    histogram.add(0.2, 3)
    assert histogram.counts == [2, 5, 1] and histogram.total == pytest.approx(8.35001)
