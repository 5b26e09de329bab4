"""`tessera bench online`: every server gets the same load, and what failed is a row with its reason."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from fake_server import Fake, running_fake
from tessera import cli
from tessera.bench.benchmark import Done
from tessera.bench.online.benchmark import OnlineBenchmark, Replay
from tessera.bench.online.results import table
from tessera.bench.online.trace import poisson
from tessera.bench.online.trace_prompts import PLAIN_IDS, Vocabulary
from tessera.bench.record import Record, Subject, read
from tessera.bench.served.servers import ExternalServer, Server, ServerProcess, serve_flags
from tessera.bench.served.targets import OwnTarget, UrlTarget, url_targets
from tessera.bench.subjects import Wanted
from tessera.commands.flags import Parser, add_model, engine_config
from tessera.config import EngineConfig
from tessera.errors import TesseraError

SMALL = ("--max-model-len", "256", "--num-pages", "100", "--cpu-threads", "1", "--dtype", "float32")
SDPA = ("--prefill-attention", "torch_sdpa", "--decode-attention", "torch_sdpa")
LOAD = ("--num-requests", "3", "--rate", "20", "--input-len", "20..40", "--output-len", "4", "--num-warmup", "1")
REPLAY = Replay(
    trace=poisson(rate=40, number=4, input_len="8", output_len="5", seed=0),
    scales=[0.5, 1.0],
    vocabulary=Vocabulary(PLAIN_IDS),
    case={"rate": 40},
    num_warmup=1,
    timeout_s=5,
)


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    with running_fake() as running:
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess([*SMALL, *SDPA]) as running:
        assert isinstance(running, ServerProcess)
        yield running


def _bench(tmp_path: Path, *args: str) -> tuple[int, list[Record], dict[str, Any]]:
    out = tmp_path / "rows" / "online.jsonl"
    code = cli.main(["bench", "online", "--out", str(out), *args])
    return code, read(out), json.loads((tmp_path / "rows" / "online_results.json").read_text())


def _run(benchmark: OnlineBenchmark) -> list[Record]:
    return list(benchmark.records())


def test_own_servers_are_replayed_against_and_proven(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*SMALL, *LOAD, "--no-enable-prefix-caching", "--repeats", "1", "--scales", "0.5,1", "--seed", "7")
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
    assert figures["peak_memory_bytes"] > 2e8 and figures["client_cpu"] > 0 and figures["client_lag_ms"] > 0
    assert [len(row.samples[name]) for name in ("ttft_ms", "tpot_ms", "e2e_ms", "itl_ms")] == [3, 3, 3, 9]
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


def test_any_openai_server_is_measured_and_a_failing_one_is_a_failed_row(
    tmp_path: Path, fake: Fake, server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = ("steady", "drop", "short", "http500", "ignores3")
    urls = {"ours": server.url, "nobody": "http://127.0.0.1:9/v1", **{mode: fake.url(mode) for mode in modes}}
    words = [word for name, url in urls.items() for word in ("--url", f"{name}={url}")]
    code, rows, _ = _bench(tmp_path, *words, *LOAD, "--repeats", "1", "--scales", "1", "--json")
    found = {row.subject.label: row for row in rows}
    assert code == 0 and {label: row.status for label, row in found.items()} == {
        "ours": "ok",
        "nobody": "failed",
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
    assert "did not answer" in found["nobody"].reason and "/v1/models" in found["nobody"].reason
    assert "connection broke" in found["drop"].reason and "HTTP 500" in found["http500"].reason
    assert "3 tokens came, 4 were asked for" in found["short"].reason
    assert not any(row.metrics or row.samples for row in rows if row.status != "ok")
    sent = [each.body["prompt"] for each in fake.record("steady")]
    assert sorted(map(len, sent))[0] >= 20 and len(set(map(tuple, sent))) == 4
    assert [json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()] == [row.status for row in rows]


def test_texts_are_sent_where_ids_are_not_taken(tmp_path: Path, fake: Fake) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps({"timestamp": 5, "input_length": 33, "output_length": 4, "hash_ids": [1]}) + "\n")
    options = ("--prompt-text", "--trace", str(trace), "--repeats", "1", "--scales", "1", "--slo-tpot-ms", "0.01")
    _, [row], _ = _bench(tmp_path, "--url", f"text={fake.url('steady')}", *options)
    assert {len(each.body["prompt"].split()) for each in fake.record("steady")} == {33}
    assert row.status == "ok" and row.conditions.settings["prompts"] == "text" and row.case["num_requests"] == 1
    assert str(row.case["trace"]).startswith("trace.jsonl (") and row.metrics["goodput_share"] == 0


def test_a_request_that_takes_too_long_is_a_failure(tmp_path: Path, fake: Fake) -> None:
    options = (*LOAD, "--repeats", "1", "--scales", "1", "--request-timeout", "0.3", "--num-warmup", "0")
    code, [row], results = _bench(tmp_path, "--url", f"stall={fake.url('stall')}", *options)
    assert code == 1 and row.reason == "3 of 3 requests failed: 3x no end within 0.3 s"
    assert results["results"][0]["status"] == "failed" and "req_s" not in results["results"][0]


def test_a_client_that_was_the_bottleneck_is_told_of_in_the_row_and_on_stderr(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tessera.bench.served.latency.MAX_CLIENT_CPU", 0.0)
    monkeypatch.setattr("tessera.log.logger.propagate", True)
    [row, _] = _run(OnlineBenchmark([UrlTarget("a", fake.url("steady"))], REPLAY, repeats=1))
    fake.record("steady")
    assert row.status == "ok" and "the client was the bottleneck: it used" in row.subject.note
    assert "a at scale 0.5: the client was the bottleneck" in caplog.text


def test_all_servers_get_the_same_calls_in_turn_and_each_replay_new_prompts(fake: Fake) -> None:
    targets = [UrlTarget("a", fake.url("steady")), UrlTarget("b", fake.url("chunks3"))]
    rows = _run(OnlineBenchmark(targets, replace(REPLAY, num_warmup=0), repeats=2))
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
        sorted(json.dumps(each.body, sort_keys=True) for each in fake.record(mode)) for mode in ("steady", "chunks3")
    ]
    assert bodies[0] == bodies[1]
    assert len({json.dumps(json.loads(body)["prompt"]) for body in bodies[0]}) == 2 * 2 * 4


def test_a_scale_that_is_there_is_left_out_and_one_that_some_lack_is_replayed_for_all(fake: Fake) -> None:
    targets = [UrlTarget("a", fake.url("steady")), UrlTarget("b", fake.url("chunks3"))]
    benchmark = OnlineBenchmark(targets, REPLAY, repeats=2)
    rows = _run(benchmark)
    for mode in ("steady", "chunks3"):
        fake.record(mode)
    done = {Done(row.case_key, row.subject.label, row.repeat) for row in rows}
    assert benchmark.num_records == 8
    again = list(benchmark.records(done - {Done(rows[0].case_key, "a", 0)}))
    assert [(row.case, row.repeat, row.subject.label) for row in again] == [
        (rows[0].case, 0, "a"),
        (rows[0].case, 0, "b"),
    ]
    assert [len(fake.record(mode)) for mode in ("steady", "chunks3")] == [4 + 1] * 2
    assert not list(benchmark.records(done)) and not fake.record("steady")
    assert len(table([*rows, *again])) == 1 + 4 and not any("failed" in cells[-1] for cells in table([*rows, *again]))


def test_prompts_that_a_server_counts_otherwise_make_a_failed_row(fake: Fake) -> None:
    [row, _] = _run(OnlineBenchmark([UrlTarget("a", fake.url("miscounts"))], REPLAY, repeats=1))
    assert row.status == "failed" and not row.metrics
    assert row.reason.endswith("4 of 9 where 8 were asked for")


def test_a_failed_warm_up_is_a_failed_row(fake: Fake) -> None:
    rows = _run(OnlineBenchmark([UrlTarget("a", fake.url("ends"))], REPLAY, repeats=1))
    assert [row.status for row in rows] == ["failed"] * 2
    assert all("in the warm-up 1 of 1 requests failed" in row.reason for row in rows)


def test_a_trace_longer_than_the_context_is_a_failed_row(server: ServerProcess) -> None:
    trace = poisson(rate=40, number=2, input_len="250", output_len="50", seed=0)
    [row, _] = _run(OnlineBenchmark([UrlTarget("ours", server.url)], replace(REPLAY, trace=trace), repeats=1))
    assert "longest request has 300 tokens, the server takes 256" in row.reason and row.status == "failed"


def test_no_replay_profits_from_what_another_left_in_the_cache(server: ServerProcess) -> None:
    """The prefix cache is on; the trace itself shares the first of three pages."""
    trace = poisson(rate=40, number=3, input_len="40", output_len="1", seed=0)
    ids = [(0, 1, 2), (0, 3, 4), (0, 5, 6)]
    apart = [replace(each, hash_ids=ids[i], at_s=2.0 * i) for i, each in enumerate(trace.arrivals)]
    replay = replace(REPLAY, trace=replace(trace, arrivals=apart, block_tokens=16), scales=[0.3, 0.4], num_warmup=0)
    share = 2 * 16 / 120
    assert replay.trace.shared_share == pytest.approx(share)
    ours = OnlineBenchmark([UrlTarget("ours", server.url)], replay, repeats=1)
    rows = _run(ours)
    assert [row.metrics["cached_prompt_share"] for row in rows] == pytest.approx([share] * 2)
    assert not any("warm" in row.subject.note for row in rows)
    anew = next(OnlineBenchmark([UrlTarget("ours", server.url)], replay, repeats=1, command="another").records())
    assert anew.metrics["cached_prompt_share"] == pytest.approx(share), "nor one of an earlier command"
    assert anew.conditions.settings["prompt_salt"] == anew.provenance.run
    again = next(ours.records())  # where the very same is sent again, it is told of
    assert again.metrics["cached_prompt_share"] == pytest.approx(3 * 32 / 120)
    assert "the prefix cache was warm: 80% of the prompts were found in it, the trace shares 27%" in again.subject.note


def test_a_server_says_what_it_is(server: ServerProcess) -> None:
    assert server.model == "SmolLM2-135M-Instruct" and server.url.endswith("/v1")
    assert {choice.phase: choice.backend for choice in server.attention()} == dict.fromkeys(
        ("prefill", "decode"), "torch_sdpa"
    )
    assert all(choice.proofs for choice in server.attention())
    status, peak = server.status(), server.peak_memory_bytes()
    assert status and status.pages_total > 50 and peak and 2e8 < peak < 2e10
    outside = ExternalServer(server.url)
    assert outside.info == server.info and outside.peak_memory_bytes() is None
    assert outside.subject("x").proofs == server.subject(Wanted("torch_sdpa", "torch_sdpa")).proofs


def test_each_token_has_a_chunk_where_usage_is_told_in_each(server: ServerProcess) -> None:
    """Also a token whose text is held back or that has none, as here an end token that is ignored."""
    assert server.info
    bias = {str(server.info.eos_token_ids[0]): 100}
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"max_tokens": 5, "stream": True, "stream_options": options, "ignore_eos": True, "logit_bias": bias}
    for path, what in (
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        data = json.dumps(body | what | {"temperature": 0}).encode()
        request = urllib.request.Request(f"{server.url}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            events = [json.loads(line[6:]) for line in response if line.startswith(b"data: {")]
        counts = [event["usage"]["completion_tokens"] for event in events if event["choices"]]
        assert [count for count in counts if count] == [1, 2, 3, 4, 5], path


def test_a_server_that_does_not_start_says_why_in_its_own_words() -> None:
    with pytest.raises(TesseraError, match=r"did not serve within 0\.1 s"):
        ServerProcess(SMALL, start_seconds=0.1)
    rows = _run(OnlineBenchmark([OwnTarget(Wanted("nope", "nope"), SMALL)], REPLAY, repeats=1))
    assert [row.status for row in rows] == ["failed"] * 2
    assert rows[0].reason.startswith("the server ended with exit code 2: unknown attention backend 'nope'")
    assert rows[0].reason.endswith("hint: see `tessera backends`")


def test_a_killed_benchmark_leaves_no_server_behind() -> None:
    code = "from tessera.bench.served.servers import ServerProcess\nServerProcess(['--num-pages', '50'])"
    benchmark = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 20
    while not (children := psutil.Process(benchmark.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.02)
    while "serve" not in children[0].cmdline() and time.monotonic() < deadline:  # until then it is a copy of its parent
        time.sleep(0.02)
    benchmark.kill()
    benchmark.wait()
    assert children and not psutil.wait_procs(children, timeout=15)[1]


def test_flags_of_the_engine_are_handed_on_and_those_for_attention_refused() -> None:
    words = ["--dtype", "float32", "--no-enable-prefix-caching", "--num-pages", "7", "--seed", "-3", "--model", "a b"]
    parser = Parser()
    add_model(parser)
    config = engine_config(parser.parse_args(words))
    assert engine_config(parser.parse_args(serve_flags(config))) == config and serve_flags(EngineConfig()) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--attention", "naive"], "--attention naive is decided by the benchmark"),
        (["--no-prove-attention"], "--prove-attention False is decided by the benchmark"),
        (["--backends", "nope"], "unknown attention backend 'nope'"),
        (["--url", "x"], "--url 'x' is no NAME=URL"),
        (["--url", "x=ftp://a"], "--url 'x=ftp://a' is no NAME=URL"),
        (["--url", "a=http://h/v1", "--url", "a=http://i/v1"], "a is named twice"),
        (["--url", "a=http://h/v1", "--num-pages", "9"], "--num-pages is for servers that are started here"),
        (["--url", "a=http://h/v1", "--dtype", "float32"], "--dtype is for servers that are started here"),
        (["--scales", "fast"], "--scales has 'fast'"),
        (["--rate", "0"], "rate must be a number from 0.001"),
        (["--num-requests", "0"], "num_requests must be"),
        (["--num-warmup", "-1"], "num_warmup must be"),
        (["--slo-ttft-ms", "0"], "slo_ttft_ms must be"),
        (["--slo-tpot-ms", "0"], "slo_tpot_ms must be"),
        (["--request-timeout", "0"], "request_timeout must be"),
        (["--input-len", "long"], "--input-len 'long'"),
        (["--trace", "none.jsonl"], "there is no trace none.jsonl"),
        (["--seed", "-1"], "--seed -1 is negative"),
        (["--out", "rows.json"], "rows.json does not end in .jsonl"),
        (["--repeats", "0"], "repeats must be"),
    ],
)
def test_wrong_input_is_a_sentence_and_a_hint(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main(
            ["bench", "online", "--backends", "naive", *args]
            if "--url" not in args and "--backends" not in args
            else ["bench", "online", *args]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert words in said and "hint: " in said and not list(tmp_path.iterdir())


def test_urls_have_names_and_the_key_is_sent_and_written_nowhere(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_API_KEY", "secret")
    [named, bare] = url_targets(["vllm=http://127.0.0.1:8000/v1", "https://host:9/a=b/v1"])
    assert (named.label, named.url, bare.label, bare.url) == (
        "vllm",
        "http://127.0.0.1:8000/v1",
        "host:9",
        "https://host:9/a=b/v1",
    )
    assert "secret" not in repr(named)
    [row, _] = _run(OnlineBenchmark(url_targets([f"a={fake.url('steady')}"]), REPLAY, repeats=1))
    assert row.status == "ok" and {each.body["key"] for each in fake.record("steady")} == {"Bearer secret"}
    assert b"secret" not in msgspec.json.encode(row)


def test_a_server_that_dies_is_a_failed_row_and_is_cleared_away(server: ServerProcess, fake: Fake) -> None:
    """The last test of the server that all share."""

    class Dying(OwnTarget):
        def start(self) -> tuple[Server, Subject]:
            subject = server.subject(self.wanted)
            server.process.send_signal(signal.SIGKILL)
            return server, subject

    processes = server._processes()
    dying = Dying(Wanted("torch_sdpa", "torch_sdpa"), SMALL)
    rows = _run(OnlineBenchmark([dying, UrlTarget("b", fake.url("steady"))], REPLAY, repeats=1))
    assert [row.status for row in rows] == ["failed", "failed", "ok", "ok"]
    assert "does not answer" in rows[0].reason or "did not answer" in rows[0].reason
    wait_for_end = psutil.wait_procs(processes, timeout=15)
    assert len(processes) > 1 and not wait_for_end[1]
