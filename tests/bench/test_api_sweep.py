"""`tessera bench api` measures what a server did, asks what it says it asks, and takes no failure for a figure."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import api_fake
from fake_server import Answer, Fake
from tessera.bench.api.benchmark import ApiBenchmark
from tessera.bench.api.options import ApiOptions
from tessera.bench.api.tables import lines
from tessera.bench.benchmark import Done
from tessera.bench.record import Record, read
from tessera.bench.served.targets import url_targets
from tessera.cli import main


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    process = subprocess.Popen(
        [sys.executable, api_fake.__file__], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(Path.cwd())}
    )
    assert process.stdout
    try:
        yield Fake(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _sweep(fake: Fake, modes: str | list[str], *flags: str, code: int = 0) -> list[Record]:
    """Rows of a small sweep; later flags win over earlier ones."""
    urls = [f"--url={mode}={fake.url(mode)}" for mode in ([modes] if isinstance(modes, str) else modes)]
    small = ("--concurrency=2", "--input-lens=20", "--output-len=4", "--repeats=1")
    assert main(["bench", "api", *urls, *small, *flags, "--log-level=error"]) == code
    return read(Path("results/api.jsonl"))


def _measured(fake: Fake, mode: str, max_tokens: int = 4) -> list[Answer]:
    """What the server did for the requests that were measured, not those that warm up or count."""
    answers = [each for each in fake.record(mode) if each.body["max_tokens"] == max_tokens]
    return answers


def _prompts(answers: list[Answer]) -> list[Any]:
    return [each.body.get("prompt") or each.body["messages"][0]["content"] for each in answers]


def test_throughput_and_first_tokens_are_those_of_the_servers_own_record(fake: Fake) -> None:
    """One sweep of a few: a busy machine may wake either side late, a client that measures wrongly always does."""
    for attempt in range(4):
        row = _sweep(fake, "slow", "--concurrency=4", "--output-len=30", "--input-lens=45")[-1]
        truth = _measured(fake, "slow", 30)
        assert len(truth) == 4
        began = min(each.came for each in truth)
        firsts = sorted(1000 * (each.tokens[0] - each.came) for each in truth)
        expected = {
            "generation_tok_s": 4 * 30 / (max(each.tokens[-1] for each in truth) - began),
            "prompt_tok_s": 4 * 45 / (max(each.tokens[0] for each in truth) - began),
            "ttft_ms_min": firsts[0],
            "ttft_ms_max": firsts[-1],
            "output_tokens": 120,
            "prompt_tokens": 180,
        }
        measured = {name: row.metrics[name] for name in expected}
        told = sorted(row.samples["ttft_ms"])
        if (measured == pytest.approx(expected, rel=0.02) and told == pytest.approx(firsts, rel=0.02)) or attempt == 3:
            break
    assert firsts[-1] > 1.3 * firsts[0], "or the test would tell nothing apart"
    assert measured == pytest.approx(expected, rel=0.02) and told == pytest.approx(firsts, rel=0.02)
    assert row.metrics["ttft_ms_min"] <= row.metrics["ttft_ms_p50"] <= row.metrics["ttft_ms_max"]
    assert 0 < row.metrics["network_ms"] < 500 and 0 < row.metrics["client_cpu"] < 2


def test_tokens_are_counted_where_a_chunk_holds_several(fake: Fake) -> None:
    (row,) = _sweep(fake, "steady4", "--output-len=40", "--concurrency=3")
    truth = _measured(fake, "steady4", 40)
    assert row.metrics["output_tokens"] == 120
    seconds = max(each.tokens[-1] for each in truth) - min(each.came for each in truth)
    assert row.metrics["generation_tok_s"] == pytest.approx(120 / seconds, rel=0.1)


def test_every_level_and_length_is_a_row_and_a_request_each(fake: Fake) -> None:
    rows = _sweep(fake, "quick", "--concurrency=1,3", "--input-lens=16,33", "--repeats=2")
    cases = [(row.repeat, row.case["input_tokens"], row.case["concurrency"]) for row in rows]
    grid = [(16, 1), (16, 3), (33, 1), (33, 3)]
    assert cases == [(0, *cell) for cell in grid] + [(1, *cell) for cell in grid[::-1]], "turned about in repeat 1"
    prompts = [prompt for prompt in _prompts(fake.record("quick")) if prompt]
    assert sorted(map(len, prompts)) == [16] * 16 + [33] * 16, "the requests of a level and as many that warm up, twice"
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 32, "no prompt begins as another does"
    assert all(row.conditions.cache == "cold" and row.case["prompts"] == "distinct" for row in rows)
    assert rows[0].conditions.warmup.startswith("before each row as many requests at once as it has, for 8 tokens")


def test_a_sweep_is_sent_by_the_processes_that_were_asked_for(fake: Fake) -> None:
    rows = _sweep(fake, "quick", "--concurrency=1,4", "--client-processes=2")
    assert [row.metrics["client_processes"] for row in rows] == [1, 2], "a request needs no more than one"
    assert [row.conditions.settings["client_processes"] for row in rows] == [2, 2]
    assert len(fake.record("quick")) == 2 * (1 + 4)


def test_same_prompt_sends_one_and_says_so(fake: Fake) -> None:
    (row,) = _sweep(fake, "remembers", "--same-prompt", "--concurrency=3")
    prompts = _prompts(fake.record("remembers"))
    assert len(prompts) == 6 and len({tuple(prompt) for prompt in prompts}) == 1, "those that warm up, too"
    assert (row.status, row.conditions.cache, row.case["prompts"]) == ("ok", "warm", "same")
    assert row.metrics["cached_prompt_tokens"] == 3 * 16


def test_new_prompts_that_come_out_of_a_cache_are_no_figure(fake: Fake) -> None:
    (row,) = _sweep(fake, "remembers", code=1)
    assert row.status == "failed" and "2 of 2 prompts came out of the prefix cache" in row.reason


@pytest.mark.parametrize(("flag", "added"), [("--no-chat", 1), ("--chat", 7)])
def test_a_server_without_tokenize_gets_words_that_it_counts_as_asked(fake: Fake, flag: str, added: int) -> None:
    (row,) = _sweep(fake, "words", flag, "--input-lens=60", "--concurrency=8")
    answers = _measured(fake, "words")
    assert row.status == "ok" and row.metrics["prompt_tokens"] == 8 * 60
    texts = _prompts(answers)
    assert {api_fake.num_tokens(text) + added for text in texts} == {60} and len(set(texts)) == 16, (
        "with those that warm up"
    )
    assert all(("messages" in each.body) is (flag == "--chat") for each in answers)


def test_a_prompt_shorter_than_what_the_server_adds_is_a_failed_row(fake: Fake) -> None:
    (row,) = _sweep(fake, "words", "--chat", "--input-lens=7", code=1)
    assert "the server adds 7 of its own" in row.reason and "hint: use --input-lens 8" in row.reason


@pytest.mark.parametrize("mode", ["http500", "drop", "ends", "error", "short", "nodone", "plain"])
def test_a_server_that_fails_gives_a_failed_row_and_the_other_its_figures(fake: Fake, mode: str) -> None:
    bad, good = _sweep(fake, [mode, "quick"])
    assert (bad.status, bad.metrics) == ("failed", {}) and "in the warm-up 2 of 2 requests failed" in bad.reason
    assert good.status == "ok" and good.metrics["generation_tok_s"] > 0


def test_where_all_fail_no_table_has_a_number(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    _sweep(fake, ["http500", "drop"], "--results=r.json", code=1)
    found = json.loads(Path("r.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [each["medians"] for each in found["results"]] == [{}, {}]
    assert [each["succeeded"] for each in found["results"]] == [0, 0]
    out = capsys.readouterr().out + Path("results/api.md").read_text()
    assert "inf" not in out.lower().replace("info", "") and "| 2 | - | - | - | - | 0/1: failed:" in out


def test_the_time_limit_is_obeyed(fake: Fake) -> None:
    (row,) = _sweep(fake, "slow", "--request-timeout=0.2", code=1)
    assert "no end within 0.2 s" in row.reason


@pytest.mark.parametrize(("flag", "sent"), [("--ignore-eos", True), ("--no-ignore-eos", None)])
def test_end_tokens_are_ignored_unless_forbidden(fake: Fake, flag: str, sent: bool | None) -> None:
    (row,) = _sweep(fake, "short", flag, code=0 if sent is None else 1)
    assert {each.body.get("ignore_eos") for each in fake.record("short")} == {sent}
    assert row.metrics.get("output_tokens") == (6 if sent is None else None), "two answers, one token short each"


def test_tables_say_what_was_measured_and_what_it_means(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    rows = _sweep(
        fake,
        "quick",
        "--concurrency=1",
        "--repeats=3",
        "--markdown=tables/sweep.md",
        "--results=r.yaml",
        "--out=results/api.jsonl",
    )
    text, found = Path("tables/sweep.md").read_text(), yaml.safe_load(Path("r.yaml").read_text())
    for told in ("Input tokens: 20", "Output tokens: 4", "Test model: fake", "Network latency: ", "GPU memory in use"):
        assert told in text
    assert "not proven" in text and "first sending to the last token" in text and "prefix cache cold" in text
    (result,) = found["results"]
    speeds = sorted(row.metrics["generation_tok_s"] for row in rows)
    assert result["medians"]["generation_tok_s"] == speeds[1] and math.isfinite(speeds[1])
    assert (
        f"{speeds[1]:.2f} ({speeds[0]:.2f}-{speeds[2]:.2f})" in text and f"{speeds[1]:.2f}" in capsys.readouterr().out
    )
    assert result["proven"] is False and set(found["definitions"]) >= {"generation_tok_s", "prompt_tok_s"}


def test_a_level_that_is_done_is_left_out_and_one_that_some_lack_is_measured_for_all(fake: Fake) -> None:
    targets = url_targets([f"quick={fake.url('quick')}", f"chunks3={fake.url('chunks3')}"])
    options = ApiOptions(concurrency="1,2", input_lens="20", output_len=4)
    rows = list(ApiBenchmark(targets, options, model="fake", repeats=1).records())
    done = {Done(row.case_key, row.subject.label, row.repeat) for row in rows}
    missing = Done(rows[0].case_key, "quick", 0)
    for mode in ("quick", "chunks3"):
        fake.record(mode)
    again = list(ApiBenchmark(targets, options, model="fake", repeats=1).records(done - {missing}))
    assert [(row.case, row.subject.label, row.status) for row in again] == [
        (rows[0].case, "quick", "ok"),
        (rows[0].case, "chunks3", "ok"),
    ]
    assert [len(fake.record(mode)) for mode in ("quick", "chunks3")] == [2, 2], "a request, and one that warms up"
    assert not list(ApiBenchmark(targets, options, model="fake", repeats=1).records(done)) and not fake.record("quick")
    assert len(lines([*rows, *again])) == 4 and {line.cells()[-1] for line in lines([*rows, *again])} == {"1/1"}
