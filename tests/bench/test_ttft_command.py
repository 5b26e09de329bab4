"""`tessera bench ttft` as a user calls it: bad input, and the real model in four bars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tessera.bench.record import read
from tessera.cli import main


@pytest.mark.parametrize(
    ("flag", "problem", "hint"),
    [
        ("--prompt-lens=many", "--prompt-lens has 'many'", "--prompt-lens"),
        ("--prompt-lens=0", "0, which is not between 1", "--prompt-lens"),
        ("--prompt-lens=32,32", "has a number twice", "--repeats"),
        ("--prompt-lens=32,9000", "a prompt of 9000 tokens", "--prompt-lens 32"),
        ("--max-model-len=512", "more than the 512 of SmolLM2", "--prompt-lens 32,128"),
        ("--requests=0", "requests must be a whole number from 1", "--requests"),
        ("--repeats=0", "repeats must be a whole number from 1", "--repeats"),
        ("--request-timeout=0", "request_timeout must be a number from 0.01", "--request-timeout"),
        ("--models=default,default", "or one twice", "--models A,B"),
        ("--models=", "an empty name", "--models A,B"),
        ("--models=dummy:350m", "no model dummy:350m", "dummy:360m"),
        ("--models=./nowhere.gguf", "no such file", "--model"),
        ("--fast=tritn", "tritn", "triton"),
        ("--fast=naive", "the simple backend", "leave it out"),
        ("--fast=usable", "names", "--fast triton"),
        ("--fast=triton", "--fast triton cannot serve SmolLM2", "`tessera backends`"),
        ("--out=/proc/none/x.jsonl", "--out /proc/none/x.jsonl cannot be written: ", "name a place"),
        ("--out=x.csv", "--out x.csv does not end in .jsonl", "--out x.jsonl"),
        ("--model=x", "--model x is not for this benchmark", "--models"),
        ("--no-enable-prefix-caching", "is decided by the benchmark", "leave it out"),
        ("--attention=naive", "--attention naive is decided", "--fast"),
        ("--decode-attention=naive", "--decode-attention naive is decided", "--fast"),
        ("--no-prove-attention", "decided by the benchmark", "leave"),
    ],
)
def test_bad_input_is_a_sentence_and_a_hint(
    flag: str,
    problem: str,
    hint: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "ttft", flag]) in (1, 2)
    said = capsys.readouterr().err
    assert problem in said and hint in said.partition("hint: ")[2]
    assert not list(tmp_path.iterdir()), "nothing was measured"


@pytest.mark.usefixtures("keep_servers")
def test_a_model_in_four_bars_with_proofs_and_hits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [
        small[0].replace("--model=", "--models="),
        "--prompt-lens=16,64",
        "--fast=torch_sdpa",
        "--requests=2",
        "--repeats=1",
        "--json",
    ]
    assert main(["bench", "ttft", *flags, *small[1:], "--log-level=error"]) == 0
    rows = read(Path("results/ttft.jsonl"))
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["metrics"] for each in shown] == [row.metrics for row in rows]
    labels = ["network", "naive, no prefix cache", "torch_sdpa, no prefix cache", "torch_sdpa, prefix cache warm"]
    bars = {(row.case["prompt_tokens"], row.subject.label): row for row in rows}
    assert set(bars) == {(length, label) for length in (16, 64) for label in labels} and len(rows) == 8
    network, simple, fast, warm = (bars[64, label] for label in labels)
    assert all(len(row.samples["ttft_ms"]) == 2 for row in (network, simple, fast, warm))
    assert network.metrics["ttft_ms"] < min(row.metrics["ttft_ms"] for row in (simple, fast, warm))
    assert {proof.backend for proof in simple.subject.proofs} == {"naive"} and simple.conditions.cache == "off"
    assert {proof.backend for proof in fast.subject.proofs} == {"torch_sdpa"} and fast.conditions.cache == "off"
    assert fast.metrics["cached_prompt_tokens"] == 0
    assert warm.conditions.cache == "warm" and warm.metrics["cached_prompt_tokens"] == 2 * 48
    short = bars[16, labels[3]]
    assert short.status == "failed" and "did not come out of the prefix cache" in short.reason and not short.metrics
