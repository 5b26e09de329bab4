"""Latencies, throughput and goodput of replies follow their definitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from tessera.bench.served.latency import (
    Promise,
    bottleneck,
    client_figures,
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
from tessera.bench.served.load import Load, Reply
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


def _sent_late(lates: list[float], *, cpu: float = 0.0, wake_s: Sequence[float] = (), error: str = "") -> str:
    """What is said of calls sent so many seconds late, each with a TTFT of 100 ms and a gap of 50 ms."""
    replies = [_reply([late + 0.1, late + 0.15], sent_s=late, error=error) for late in lates]
    return bottleneck(Load(replies, 1, client_cpu=cpu, lag_s=max(lates), wake_s=list(wake_s)))


def test_the_bottleneck_is_told_by_processor_time_lag_or_late_reading() -> None:
    assert _sent_late([0.0099], cpu=0.79, wake_s=[0.0049]) == ""
    assert "81% of a core" in _sent_late([0.0], cpu=0.81)
    assert _sent_late([0.0101]).endswith("it sent calls 10.1 ms late (p50), with a TTFT of 100.0 ms there")
    late_reading = _sent_late([0.0], wake_s=[0.0051])
    assert late_reading.endswith("it noted arrivals after 5.1 ms (p50), with a gap between tokens of 50.0 ms")
    assert _sent_late([0.0101], error="broken") == "", "failed replies are left out"


def test_one_late_call_is_held_against_the_percentile_that_it_spoils() -> None:
    """Two of a hundred are the 99th percentile's, one of a thousand is nobody's, half of all are the median's."""
    assert "late (p99)" in _sent_late([0.0] * 98 + [0.1] * 2)
    assert _sent_late([0.0] * 999 + [0.1]) == "" == _sent_late([0.0] * 58 + [0.1] * 2), "of 60 there is no p99"
    assert "late (p90)" in _sent_late([0.0] * 80 + [0.02] * 20) and "late (p50)" in _sent_late([0.02] * 60)
    assert "late (p90)" not in _sent_late([0.0] * 7 + [0.02] * 2) and "late (p50)" in _sent_late([0.02])
    assert "noted arrivals after 40.0 ms (p99)" in _sent_late([0.0] * 100, wake_s=[0.0] * 98 + [0.04] * 2)


def test_where_gaps_are_no_figure_late_reading_is_held_against_first_tokens() -> None:
    load = Load([_reply([0.1, 0.15])], 1, client_cpu=0, lag_s=0, wake_s=[0.0051])
    assert "gap between tokens of 50.0 ms" in bottleneck(load) and bottleneck(load, has_gaps=False) == ""
    load = replace(load, wake_s=[0.0101])
    assert bottleneck(load, has_gaps=False).endswith("it noted arrivals after 10.1 ms (p50), with a TTFT of 100.0 ms")


def test_the_clients_own_figures_are_in_a_row() -> None:
    replies = [_reply([1.0], sent_s=0.001 * i) for i in range(3)]
    load = Load(replies, 1, 0.3, lag_s=0.002, wake_s=[0.004], client_cpu_total=0.5, num_processes=2)
    told = client_figures(load)
    assert (told["client_cpu"], told["client_cpu_total"], told["client_processes"]) == (0.3, 0.5, 2)
    assert (told["client_lag_ms"], told["client_lag_ms_p50"]) == pytest.approx((2, 1))
    assert told["client_wake_ms_p99"] == pytest.approx(4)
