"""Servers of ours and of others: what they say of themselves, and what is said where they do not start or answer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import msgspec
import psutil
import pytest

from fake_server import Fake
from online_replay import REPLAY, rows_of
from tessera import cli
from tessera.bench.online.benchmark import OnlineBenchmark
from tessera.bench.record import Subject
from tessera.bench.served.servers import ExternalServer, Server, ServerProcess, serve_flags
from tessera.bench.served.targets import OwnTarget, UrlTarget, check_urls, url_targets
from tessera.bench.subjects import Wanted
from tessera.commands.flags import Parser, add_model, engine_config
from tessera.config import EngineConfig
from tessera.errors import ConfigError, TesseraError


def test_a_server_says_what_it_is(server: ServerProcess) -> None:
    assert server.model == "tiny" and server.url.endswith("/v1")
    assert {choice.phase: choice.backend for choice in server.attention()} == dict.fromkeys(
        ("prefill", "decode"), "torch_sdpa"
    )
    assert all(choice.proofs for choice in server.attention())
    status, peak = server.status(), server.peak_memory_bytes()
    assert status and status.pages_total > 50 and peak and 1e8 < peak < 2e10
    outside = ExternalServer(server.url)
    assert outside.info == server.info and outside.peak_memory_bytes() is None
    assert outside.subject("x").proofs == server.subject(Wanted("torch_sdpa", "torch_sdpa")).proofs


def test_each_token_is_counted_in_the_chunk_that_brings_it_where_usage_is_told_in_each(server: ServerProcess) -> None:
    """Also a token whose text is held back or that has none, as here an end token that is ignored.

    Tokens that wait together share a chunk, which counts them all: 200, so that a machine busy otherwise is not done
    with all of them before the first is sent.
    """
    assert server.info
    bias = {str(server.info.eos_token_ids[0]): 100}
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"max_tokens": 200, "stream": True, "stream_options": options, "ignore_eos": True, "logit_bias": bias}
    for path, what in (
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        data = json.dumps(body | what | {"temperature": 0}).encode()
        request = urllib.request.Request(f"{server.url}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            events = [json.loads(line[6:]) for line in response if line.startswith(b"data: {")]
        counts = [event["usage"]["completion_tokens"] for event in events if event["choices"]]
        told = [count for count in counts if count]
        assert told == sorted(set(told)) and told[-1] == 200 and len(told) >= 2, path


def test_a_server_that_does_not_start_says_why_in_its_own_words(small: tuple[str, ...]) -> None:
    with pytest.raises(TesseraError, match=r"did not serve within 0\.1 s"):
        ServerProcess(small, start_seconds=0.1)
    rows = rows_of(OnlineBenchmark([OwnTarget(Wanted("nope", "nope"), small)], REPLAY, repeats=1))
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
    [row, _] = rows_of(OnlineBenchmark(url_targets([f"a={fake.url('steady')}"]), REPLAY, repeats=1))
    assert row.status == "ok" and {each.body["key"] for each in fake.record("steady")} == {"Bearer secret"}
    assert b"secret" not in msgspec.json.encode(row)


def test_a_server_that_dies_is_a_failed_row_and_is_cleared_away(small: tuple[str, ...], fake: Fake) -> None:
    processes: list[psutil.Process] = []

    class Dying(OwnTarget):
        def start(self) -> tuple[Server, Subject]:
            server, subject = super().start()
            assert isinstance(server, ServerProcess)
            processes.extend(server._processes())
            server.process.send_signal(signal.SIGKILL)
            return server, subject

    dying = Dying(Wanted("torch_sdpa", "torch_sdpa"), small)
    rows = rows_of(OnlineBenchmark([dying, UrlTarget("b", fake.url("quick"))], REPLAY, repeats=1))
    fake.record("quick")
    assert [row.status for row in rows] == ["failed", "failed", "ok", "ok"]
    assert "does not answer" in rows[0].reason or "did not answer" in rows[0].reason
    assert "has ended, with exit code -9" in rows[0].reason or "see its own log" in rows[0].reason
    assert "/v1, once" not in rows[0].reason, "it is no address that somebody gave"
    assert len(processes) > 1 and not psutil.wait_procs(processes, timeout=15)[1]


def _say(url: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_urls(url_targets([f"x={url}"]))
    assert "Error" not in str(caught.value) and "errno" not in str(caught.value).lower()
    return caught.value


def test_a_url_that_does_not_answer_is_told_of_in_plain_words(fake: Fake) -> None:
    gone = _say("http://127.0.0.1:9/v1")
    assert gone.message.endswith(
        "http://127.0.0.1:9/v1/models did not answer as it should: nothing listens there, the connection was refused"
    )
    assert gone.hint == "is the server up, and does its address end in /v1, once?"
    assert "no such host is known" in _say("http://no-such-host.invalid/v1").message
    page = _say(f"{fake.root}/plain/page/v1")
    assert "it answered 404" in page.message


@pytest.mark.parametrize("written", ["", "/v1/v1"])
def test_an_address_with_v1_missing_or_doubled_is_mended_in_the_hint(fake: Fake, written: str) -> None:
    right = fake.url("quick")
    wrong = _say(right.removesuffix("/v1") + written)
    assert wrong.hint == f"use {right}"
    assert check_urls(url_targets([right])) == ["fake"]


@pytest.mark.parametrize("command", ["online", "api"])
def test_a_dead_url_is_found_out_before_any_case(
    command: str, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    urls = ["--url", f"good={fake.url('quick')}", "--url", "gone=http://127.0.0.1:9/v1"]
    assert cli.main(["bench", command, *urls]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --url gone: http://127.0.0.1:9/v1/models did not answer") and said.count("\n") == 3
    assert not fake.record("quick") and not list(tmp_path.iterdir())
