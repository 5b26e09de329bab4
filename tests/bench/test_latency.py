"""Latencies, throughput and goodput of replies follow their definitions."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from tessera.bench.served.client import Load, Reply
from tessera.bench.served.latency import (
    Promise,
    bottleneck,
    due_ttft_ms,
    e2e_ms,
    goodput,
    itl_ms,
    summary,
    throughput,
    tpot_ms,
    ttft_ms,
    wrong_lengths,
)
from tessera.bench.served.rows import device_type
from tessera.types import EngineInfo


def _reply(token_s: list[float], *, due_s: float = 0.0, sent_s: float = 0.0, error: str = "") -> Reply:
    return Reply(0, due_s, sent_s, token_s, token_s[-1], 10, len(token_s), "length", error)


def test_figures_follow_their_definitions() -> None:
    reply = _reply([1.0, 1.1, 1.4, 1.4, 1.4], due_s=0.2, sent_s=0.5)
    assert ttft_ms(reply) == pytest.approx(500) and due_ttft_ms(reply) == pytest.approx(800)
    assert tpot_ms(reply) == pytest.approx(100) and e2e_ms(reply) == pytest.approx(900)
    assert itl_ms(reply) == pytest.approx([100, 100, 100, 100])
    assert tpot_ms(_reply([1.0])) is None and itl_ms(_reply([1.0])) == []
    assert itl_ms(_reply([1.0, 1.0, 1.2])) == pytest.approx([200])  # no gap is known within the first chunk
    load = Load([reply, _reply([0.1, 0.2])], seconds=2.0, client_cpu=0.1, lag_s=0.3)
    assert throughput(load) == pytest.approx({"req_s": 1, "output_tok_s": 3.5, "prompt_tok_s": 10, "total_tok_s": 13.5})
    assert goodput(load, Promise(400, 150)) == pytest.approx({"goodput_share": 0.5, "goodput_req_s": 0.5})
    assert goodput(load, Promise(600, 99.9)) == pytest.approx({"goodput_share": 0, "goodput_req_s": 0})
    assert goodput(load, Promise(600, 100.1)) == pytest.approx({"goodput_share": 1, "goodput_req_s": 1})


def test_prompts_that_a_server_counted_otherwise_are_told_of() -> None:
    replies = [replace(_reply([1.0]), prompt_tokens=count) for count in (5, 6, 6)]
    assert wrong_lengths(replies, [5, 6, 6]) == ""
    said = wrong_lengths(replies, [5, 5, 5])
    assert said == "the server counted other prompt tokens than it was sent: 2 of 6 where 5 were asked for"


def test_a_gpu_is_cuda_in_conditions_whatever_its_name() -> None:
    assert device_type(None) == ""
    for told, kind in (("cpu", "cpu"), ("cuda (NVIDIA H200)", "cuda")):
        assert device_type(cast(EngineInfo, SimpleNamespace(device=told))) == kind


def test_a_summary_has_the_mean_and_three_percentiles() -> None:
    assert summary("x", [1.0, 3.0]) == pytest.approx({"x_mean": 2, "x_p50": 2, "x_p90": 2.8, "x_p99": 2.98})
    assert summary("x", []) == {}


def test_the_bottleneck_is_told_by_processor_time_or_lag() -> None:
    replies = [_reply([0.1, 0.2])]
    assert bottleneck(Load(replies, 1, client_cpu=0.79, lag_s=0.0099)) == ""
    assert "81% of a core" in bottleneck(Load(replies, 1, client_cpu=0.81, lag_s=0))
    assert "10.1 ms late, with a median TTFT of 100.0 ms" in bottleneck(Load(replies, 1, client_cpu=0, lag_s=0.0101))
