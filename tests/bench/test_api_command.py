"""`tessera bench api` as a user calls it: bad input, the table while it runs, and the real model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tessera.bench.api.live import run_live
from tessera.bench.provenance import provenance
from tessera.bench.record import Conditions, Record, Subject, read
from tessera.cli import main

NUM_CORES = 2
URL = "--url=x=http://127.0.0.1:9/v1"
BAD = {
    "--concurrency=two": ("--concurrency has 'two'", "--concurrency"),
    "--concurrency=0": ("0, which is not between 1 and 4096", "--concurrency"),
    "--client-processes=-1": ("client_processes must be a whole number from 0", "--client-processes"),
    "--client-processes=3": (f"--client-processes 3 is more than the {NUM_CORES} cores", f"use {NUM_CORES} at most"),
    "--client-processes=2 --concurrency=1": ("2 is more than the 1 requests at once", "use 1 at most"),
    "--concurrency=2,2": ("has a number twice", "--repeats"),
    "--input-lens=-1": ("-1, which is not between", "--input-lens"),
    "--input-lens=": ("--input-lens has ''", "--input-lens"),
    "--output-len=0": ("output_len must be a whole number from 1", "--output-len"),
    "--request-timeout=0": ("request_timeout must be a number from 0.01", "--request-timeout"),
    "--repeats=0": ("repeats must be a whole number from 1", "--repeats"),
    "--markdown=x.txt": ("--markdown x.txt does not end in .md", "--markdown x.md"),
    "--markdown=/": ("--markdown / does not end in .md", "--markdown /rows.md"),
    "--markdown=/proc/none/x.md": ("--markdown /proc/none/x.md cannot be written: ", "name a place"),
    "--results=/proc/none/x.json": ("--results /proc/none/x.json cannot be written: ", "name a place"),
    "--out=/proc/none/x.jsonl": ("--out /proc/none/x.jsonl cannot be written: ", "name a place"),
    "--results=x.csv": ("neither .json nor .yaml", "--results x.json"),
    "--out=x.csv": ("--out x.csv does not end in .jsonl", "--out x.jsonl"),
    "--url=nonsense": ("--url 'nonsense' is no NAME=URL", "--url vllm=http"),
    "--url=x=http://127.0.0.1:8/v1": ("x is named twice", "--url NAME=URL"),
    "--dtype=float32": ("only --url is measured", "--backends"),
}


@pytest.mark.parametrize("flag", BAD)
def test_bad_input_is_a_sentence_and_a_hint(
    flag: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tessera.bench.served.processes.num_cores", lambda: NUM_CORES)
    assert main(["bench", "api", URL, *flag.split()]) == 2
    said = capsys.readouterr().err
    problem, hint = BAD[flag]
    assert problem in said.partition("hint: ")[0] and hint in said.partition("hint: ")[2]
    assert not list(tmp_path.iterdir()), "nothing was measured"


@pytest.mark.parametrize(
    ("flags", "problem", "hint"),
    [
        (["--max-model-len=1024"], "2800 tokens in and 512 out are more than the 1024", "--input-lens 45"),
        (["--max-model-len=512", "--input-lens=45"], "45 tokens in and 512 out", "--output-len 256"),
        (["--attention=naive", "--output-len=8"], "--attention naive is decided by the benchmark", "--backends"),
        (["--backends=xformer"], "xformer", "xformers"),
    ],
)
def test_what_our_own_servers_cannot_do_is_refused(
    flags: list[str], problem: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "api", *flags]) in (1, 2)
    said = capsys.readouterr().err
    assert problem in said and hint in said.partition("hint: ")[2]


class _Rows:
    """A benchmark of rows that are there already."""

    kind = "api"
    num_records = 2

    def records(self, done: object = ()) -> Iterator[Record]:  # noqa: ARG002
        for level in (1, 2):
            case = {"input_tokens": 45, "concurrency": level, "output_tokens": 8, "prompts": "distinct"}
            figures = {"generation_tok_s": 11.0 * level, "prompt_tok_s": 5.0, "ttft_ms_min": 7.0, "ttft_ms_max": 9.0}
            yield Record("api", dict(case), Subject("a", "server"), "ok", Conditions(), provenance(), metrics=figures)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_table_fills_while_it_runs_and_rows_are_on_disk(tmp_path: Path, is_terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=160)
    rows = run_live(_Rows(), tmp_path / "rows.jsonl", console=console)  # type: ignore[arg-type]
    assert read(tmp_path / "rows.jsonl") == rows
    shown = screen.getvalue()
    assert "11.00" in shown and "22.00" in shown
    assert ("1 of 2 rows" in shown and "2 of 2 rows" in shown) if is_terminal else shown.count("\n") == 2


@pytest.mark.usefixtures("keep_servers")
def test_our_own_server_is_swept_with_proof_and_exact_lengths(
    tmp_path: Path, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    grid = ["--concurrency=1,2", "--input-lens=45", "--output-len=4", "--repeats=1", "--results=r.json"]
    assert main(["bench", "api", "--backends=torch_sdpa,flash_attn:4", *grid, *small, "--log-level=error"]) == 0
    assert "starting a server" not in capsys.readouterr().err, "only errors were asked for"
    rows = read(Path("results/api.jsonl"))
    assert [(row.subject.label, row.status) for row in rows] == [("torch_sdpa", "ok")] * 2 + [
        ("flash_attn:4", "unavailable")
    ] * 2
    for row, level in zip(rows[:2], (1, 2)):
        assert {proof.backend for proof in row.subject.proofs} == {"torch_sdpa"}
        assert (row.metrics["prompt_tokens"], row.metrics["output_tokens"]) == (45 * level, 4 * level)
        assert row.conditions.cache == "cold" and row.metrics["cached_prompt_tokens"] == 0
        assert row.metrics["peak_memory_bytes"] > 2**27
    served = json.loads(Path("r.json").read_text())["results"][0]
    assert served["served_by"] == {"prefill": ["torch_sdpa"], "decode": ["torch_sdpa"]} and served["proven"]
