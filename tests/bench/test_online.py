"""`tessera bench online`: every server gets the same load, and what failed is a row with its reason."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fake_server import Fake
from online_replay import REPLAY, rows_of
from tessera import cli
from tessera.bench.benchmark import Done
from tessera.bench.online.benchmark import OnlineBenchmark
from tessera.bench.online.results import table
from tessera.bench.online.trace import poisson
from tessera.bench.online.trace_prompts import Vocabulary
from tessera.bench.record import Record, read
from tessera.bench.served.servers import ServerProcess
from tessera.bench.served.targets import OwnTarget, UrlTarget
from tessera.errors import ConfigError

LOAD = ("--num-requests", "3", "--rate", "20", "--input-len", "20..40", "--output-len", "4", "--num-warmup", "1")


def _bench(tmp_path: Path, *args: str) -> tuple[int, list[Record], dict[str, Any]]:
    out = tmp_path / "rows" / "online.jsonl"
    code = cli.main(["bench", "online", "--out", str(out), *args])
    return code, read(out), json.loads((tmp_path / "rows" / "online_results.json").read_text())


@pytest.mark.usefixtures("keep_servers")
def test_own_servers_are_replayed_against_and_proven(
    tmp_path: Path, small: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*small, *LOAD, "--no-enable-prefix-caching", "--repeats", "1", "--scales", "0.5,1")
    trace = tmp_path / "trace.jsonl"
    written = ("--write-trace", str(trace), "--slo-ttft-ms", "0.02", "--slo-tpot-ms", "99999")
    code, rows, results = _bench(tmp_path, "--backends", "torch_sdpa,flash_attn:4", *flags, *written)
    assert code == 0 and [(row.subject.label, row.case["scale"], row.status) for row in rows] == [
        ("torch_sdpa", 0.5, "ok"),
        ("torch_sdpa", 1.0, "ok"),
        ("flash_attn:4", 0.5, "unavailable"),
        ("flash_attn:4", 1.0, "unavailable"),
    ]
    row = rows[0]
    assert row.subject.engine == "tessera" and {proof.backend for proof in row.subject.proofs} == {"torch_sdpa"}
    assert row.subject.resolved == {"prefill": ["torch_sdpa"], "decode": ["torch_sdpa"]}
    about = row.conditions
    assert (about.cache, about.seed, about.dtype, about.device) == ("off", 7, "float32", "cpu")
    assert about.warmup.startswith("1 requests") and about.settings["max_model_len"] == 256
    figures = row.metrics
    assert {
        f"{name}_{point}"
        for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
        for point in ("mean", "p50", "p90", "p99")
    } <= figures.keys()
    assert figures["cached_prompt_share"] == 0 and figures["num_failed"] == 0 and figures["goodput_share"] == 0
    assert figures["peak_memory_bytes"] > 1e8 and figures["client_cpu"] > 0 and figures["client_lag_ms"] > 0
    assert [len(row.samples[name]) for name in ("ttft_ms", "tpot_ms", "e2e_ms")] == [3, 3, 3]
    assert 0 < len(row.samples["itl_ms"]) <= 9, "tokens that came in one read with the first have no gap"
    assert figures["output_tok_s"] == pytest.approx(12 / figures["seconds"])
    assert len(trace.read_text().splitlines()) == 3 and "no" not in row.reason
    assert results["versions"]["torch"] and results["wall_seconds"] > 1 and results["machine"]["cores"] > 0
    entry = next(each for each in results["results"] if each["backend"] == "torch_sdpa" and each["scale"] == 0.5)
    assert entry["ttft_ms"] == {f"p{p}": figures[f"ttft_ms_p{p}"] for p in (50, 90, 99)} and set(entry) >= {
        "itl_ms",
        "e2e_ms",
        "tpot_ms",
    }
    said = capsys.readouterr()
    assert "torch_sdpa" in said.out and "unavailable: " in said.out and "online 4/4" in said.err
    started = f"starting a server for torch_sdpa: tessera serve {small[0]}"
    assert started in said.err and "--prefill-attention=torch_sdpa" in said.err
    assert re.search(r"the server for torch_sdpa is up after \d+\.\d s", said.err)


def test_any_openai_server_is_measured_and_a_failing_one_is_a_failed_row(
    tmp_path: Path, fake: Fake, server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = ("steady", "drop", "short", "http500", "ignores3")
    urls = {"ours": server.url, **{mode: fake.url(mode) for mode in modes}}
    words = [word for name, url in urls.items() for word in ("--url", f"{name}={url}")]
    code, rows, _ = _bench(tmp_path, *words, *LOAD, "--repeats", "1", "--scales", "1", "--json")
    found = {row.subject.label: row for row in rows}
    assert code == 0 and {label: row.status for label, row in found.items()} == {
        "ours": "ok",
        "steady": "ok",
        "drop": "failed",
        "short": "failed",
        "http500": "failed",
        "ignores3": "ok",
    }
    assert found["ours"].subject.engine == "tessera" and found["ours"].subject.proofs
    assert found["steady"].subject.engine == "server" and "not proven" in found["steady"].subject.note
    assert found["steady"].conditions.cache == "not recorded"
    assert "tokens spread over chunks" in found["ignores3"].subject.note
    assert "connection broke" in found["drop"].reason and "HTTP 500" in found["http500"].reason
    assert "3 tokens came, 4 were asked for" in found["short"].reason
    assert not any(row.metrics or row.samples for row in rows if row.status != "ok")
    sent = [each.body["prompt"] for each in fake.record("steady")]
    assert sorted(map(len, sent))[0] >= 20 and len(set(map(tuple, sent))) == 4
    assert [json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()] == [row.status for row in rows]


def test_so_many_streams_are_kept_in_flight_whatever_is_due(tmp_path: Path, fake: Fake) -> None:
    """Six requests, due within a second each."""
    options = ("--num-requests", "6", "--input-len", "8", "--output-len", "4", "--num-warmup", "0", "--repeats", "1")
    _, [row], _ = _bench(tmp_path, "--url", f"two={fake.url('steady')}", *options, "--concurrency", "2")
    about = {"trace": "poisson", "concurrency": 2, "num_requests": 6, "input_len": "8", "output_len": "4"}
    assert row.status == "ok" and row.case == about and table([row])[0][0] == "streams" and table([row])[1][0] == "2"
    sent = fake.record("steady")
    in_flight = [sum(other.came <= each.came < other.ended for other in sent) for each in sent]
    assert len(sent) == 6 and max(in_flight) == 2 and row.metrics["seconds"] < 3


def test_more_streams_than_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="--concurrency 5 is more than the 4 requests of the trace"):
        replace(REPLAY, concurrency=5)


def test_texts_are_sent_where_ids_are_not_taken(tmp_path: Path, fake: Fake) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps({"timestamp": 5, "input_length": 33, "output_length": 4, "hash_ids": [1]}) + "\n")
    options = ("--prompt-text", "--trace", str(trace), "--repeats", "1", "--scales", "1", "--slo-tpot-ms", "0.01")
    _, [row], _ = _bench(tmp_path, "--url", f"text={fake.url('steady')}", *options)
    assert {len(each.body["prompt"].split()) for each in fake.record("steady")} == {33}
    assert row.status == "ok" and row.conditions.settings["prompts"] == "text" and row.case["num_requests"] == 1
    assert str(row.case["trace"]).startswith("trace.jsonl (") and row.metrics["goodput_share"] == 0


def test_chats_are_messages_whose_tokens_are_those_of_the_deltas(tmp_path: Path, fake: Fake) -> None:
    """Three tokens a delta, told in each chunk; and without that, by the usage at the end."""
    modes = ("chunks3", "ignores3")
    urls = [f"--url={mode}={fake.url(mode)}" for mode in modes]
    options = (*LOAD, "--output-len", "6", "--chat", "--repeats", "1", "--scales", "1")
    _, rows, _ = _bench(tmp_path, *urls, *options)
    assert [(row.status, row.case["endpoint"]) for row in rows] == [("ok", "chat")] * 2
    for row, mode in zip(rows, modes):
        bodies = [each.body for each in fake.record(mode)]
        assert all(body["stream_options"]["include_usage"] and "prompt" not in body for body in bodies)
        messages = [body["messages"] for body in bodies]
        assert all(len(each) == 1 and each[0]["role"] == "user" for each in messages)
        lengths = [len(each[0]["content"].split()) for each in messages]
        assert 20 <= min(lengths) < max(lengths) <= 40, lengths
        assert len(row.samples["itl_ms"]) == 3 * 3, "three of six tokens come with the first chunk, which has no gap"
        assert row.metrics["output_tok_s"] == pytest.approx(3 * 6 / row.metrics["seconds"])
        assert 20 < row.metrics["ttft_ms_p50"] < 1000, "a chunk with a role only, which comes at once, is no token"
    assert "spread over chunks" in rows[1].subject.note and "spread" not in rows[0].subject.note


def test_our_own_server_is_measured_by_chats(server: ServerProcess) -> None:
    replay = replace(REPLAY, vocabulary=Vocabulary(), messages=True, case={"rate": 40, "endpoint": "chat"})
    rows = rows_of(OnlineBenchmark([UrlTarget("ours", server.url)], replay, repeats=1))
    assert [row.status for row in rows] == ["ok"] * 2, rows[0].reason
    assert all(0 < len(row.samples["itl_ms"]) <= 4 * 4 and "spread" not in row.subject.note for row in rows)
    assert all(row.metrics["output_tok_s"] == pytest.approx(4 * 5 / row.metrics["seconds"]) for row in rows)
    assert not any("prefix cache was warm" in row.subject.note for row in rows), "the template is the same in all"


def test_a_replay_is_sent_by_the_processes_that_were_asked_for(tmp_path: Path, fake: Fake) -> None:
    options = (*LOAD, "--repeats", "1", "--scales", "1", "--client-processes", "2")
    code, [row], results = _bench(tmp_path, "--url", f"a={fake.url('quick')}", *options)
    assert code == 0 and row.metrics["client_processes"] == 2 == results["results"][0]["client_processes"]
    fake.record("quick")


def test_a_request_that_takes_too_long_is_a_failure(tmp_path: Path, fake: Fake) -> None:
    options = (*LOAD, "--repeats", "1", "--scales", "1", "--request-timeout", "0.3", "--num-warmup", "0")
    code, [row], results = _bench(tmp_path, "--url", f"stall={fake.url('stall')}", *options)
    assert code == 1 and row.reason == "3 of 3 requests failed: 3x no end within 0.3 s"
    assert results["results"][0]["status"] == "failed" and "req_s" not in results["results"][0]


def test_a_client_that_was_the_bottleneck_is_told_of_in_the_row_and_on_stderr(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tessera.bench.served.latency.MAX_CLIENT_CPU", 0.0)
    [row, _] = rows_of(OnlineBenchmark([UrlTarget("a", fake.url("quick"))], REPLAY, repeats=1))
    fake.record("quick")
    assert row.status == "ok" and "the client was the bottleneck: it used" in row.subject.note
    assert "a at scale 0.5: the client was the bottleneck" in caplog.text


def test_all_servers_get_the_same_calls_in_turn_and_each_replay_new_prompts(fake: Fake) -> None:
    targets = [UrlTarget("a", fake.url("quick")), UrlTarget("b", fake.url("chunks3"))]
    rows = rows_of(OnlineBenchmark(targets, replace(REPLAY, num_warmup=0), repeats=2))
    assert [(row.repeat, row.subject.label, row.case["scale"]) for row in rows] == [
        (0, "a", 0.5),
        (0, "a", 1.0),
        (0, "b", 0.5),
        (0, "b", 1.0),
        (1, "b", 1.0),
        (1, "b", 0.5),
        (1, "a", 1.0),
        (1, "a", 0.5),
    ]
    bodies = [
        sorted(json.dumps(each.body, sort_keys=True) for each in fake.record(mode)) for mode in ("quick", "chunks3")
    ]
    assert bodies[0] == bodies[1]
    assert len({json.dumps(json.loads(body)["prompt"]) for body in bodies[0]}) == 2 * 2 * 4


def test_a_scale_that_is_there_is_left_out_and_one_that_some_lack_is_replayed_for_all(fake: Fake) -> None:
    targets = [UrlTarget("a", fake.url("quick")), UrlTarget("b", fake.url("chunks3"))]
    benchmark = OnlineBenchmark(targets, REPLAY, repeats=2)
    rows = rows_of(benchmark)
    for mode in ("quick", "chunks3"):
        fake.record(mode)
    done = {Done(row.case_key, row.subject.label, row.repeat) for row in rows}
    assert benchmark.num_records == 8
    again = list(benchmark.records(done - {Done(rows[0].case_key, "a", 0)}))
    assert [(row.case, row.repeat, row.subject.label) for row in again] == [
        (rows[0].case, 0, "a"),
        (rows[0].case, 0, "b"),
    ]
    assert [len(fake.record(mode)) for mode in ("quick", "chunks3")] == [4 + 1] * 2
    assert not list(benchmark.records(done)) and not fake.record("quick")
    assert len(table([*rows, *again])) == 1 + 4 and not any("failed" in cells[-1] for cells in table([*rows, *again]))


def test_prompts_that_a_server_counts_otherwise_make_a_failed_row(fake: Fake) -> None:
    [row, _] = rows_of(OnlineBenchmark([UrlTarget("a", fake.url("miscounts"))], REPLAY, repeats=1))
    assert row.status == "failed" and not row.metrics
    assert row.reason.endswith("4 of 9 where 8 were asked for")


def test_a_failed_warm_up_is_a_failed_row(fake: Fake) -> None:
    rows = rows_of(OnlineBenchmark([UrlTarget("a", fake.url("ends"))], REPLAY, repeats=1))
    assert [row.status for row in rows] == ["failed"] * 2
    assert all("in the warm-up 1 of 1 requests failed" in row.reason for row in rows)


def test_a_trace_longer_than_the_context_is_a_failed_row(server: ServerProcess) -> None:
    trace = poisson(rate=40, number=2, input_len="250", output_len="50", seed=0)
    [row, _] = rows_of(OnlineBenchmark([UrlTarget("ours", server.url)], replace(REPLAY, trace=trace), repeats=1))
    assert "longest request has 300 tokens, the server takes 256" in row.reason and row.status == "failed"


def test_no_replay_profits_from_what_another_left_in_the_cache(server: ServerProcess) -> None:
    """The prefix cache is on; the trace itself shares the first of three pages."""
    trace = poisson(rate=40, number=3, input_len="40", output_len="1", seed=0)
    ids = [(0, 1, 2), (0, 3, 4), (0, 5, 6)]
    apart = [replace(each, hash_ids=ids[i], at_s=1.0 * i) for i, each in enumerate(trace.arrivals)]
    replay = replace(REPLAY, trace=replace(trace, arrivals=apart, block_tokens=16), scales=[0.3, 0.4], num_warmup=0)
    share = 2 * 16 / 120
    assert replay.trace.shared_share == pytest.approx(share)
    ours = OnlineBenchmark([UrlTarget("ours", server.url)], replay, repeats=1)
    rows = rows_of(ours)
    assert [row.metrics["cached_prompt_share"] for row in rows] == pytest.approx([share] * 2)
    assert not any("warm" in row.subject.note for row in rows)
    anew = next(OnlineBenchmark([UrlTarget("ours", server.url)], replay, repeats=1, command="another").records())
    assert anew.metrics["cached_prompt_share"] == pytest.approx(share), "nor one of an earlier command"
    assert anew.conditions.settings["prompt_salt"] == anew.provenance.run
    again = next(ours.records())  # where the very same is sent again, it is told of
    assert again.metrics["cached_prompt_share"] == pytest.approx(3 * 32 / 120)
    assert "the prefix cache was warm: 80% of the prompts were found in it, the trace shares 27%" in again.subject.note


def test_a_backend_against_itself_has_two_servers(
    tmp_path: Path, small: tuple[str, ...], keep_servers: list[OwnTarget]
) -> None:
    flags = (*small, *LOAD, "--repeats", "2", "--scales", "0.5")
    _, rows, results = _bench(tmp_path, "--backends", "torch_sdpa,torch_sdpa", *flags)
    labels = ["torch_sdpa", "torch_sdpa#2", "torch_sdpa#2", "torch_sdpa"]
    assert [target.label for target in keep_servers] == labels, "each starts one, in turns"
    assert [(row.subject.label, row.status) for row in rows] == [(label, "ok") for label in labels]
    assert [entry["backend"] for entry in results["results"]] == labels[:2]
    assert {str(row.conditions.settings["server"]).split(":")[0] for row in rows} == {"started for each repeat"}


@pytest.mark.parametrize("kind", ["online", "api"])
def test_kept_servers_are_started_once_and_the_rows_say_so(
    kind: str, tmp_path: Path, small: tuple[str, ...], keep_servers: list[OwnTarget]
) -> None:
    flags = (*LOAD, "--scales", "0.5") if kind == "online" else ("--concurrency=1", "--input-lens=20", "--output-len=4")
    out = tmp_path / "rows.jsonl"
    wanted = ("--backends", "torch_sdpa,naive", "--repeats", "2", "--keep-servers", "--out", str(out))
    assert cli.main(["bench", kind, *small, *wanted, *flags]) == 0
    assert [target.label for target in keep_servers] == ["torch_sdpa", "naive"]
    assert [row.subject.label for row in read(out)] == ["torch_sdpa", "naive", "naive", "torch_sdpa"]
    assert {str(row.conditions.settings["server"]).split(":")[0] for row in read(out)} == {"kept up beside the others"}
