"""`tessera bench online` refuses what it cannot do before it does anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera import cli


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
        (["--client-processes", "-1"], "client_processes must be"),
        (["--client-processes", "2", "--num-requests", "1"], "2 is more than the 1 requests of the trace"),
        (["--client-processes", "60"], "--client-processes 60 is more than the"),
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
