"""`tessera bench compare`: its calls are ones that the benchmarks take, it goes on where it stopped, and it reports."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from tessera import cli
from tessera.bench.compare.run import run_stages
from tessera.bench.compare.stages import PARTS, CompareOptions, Effort, Stage, stages
from tessera.bench.record import read
from tessera.commands.flags import Parser
from tessera.errors import ConfigError

ENGINE = {
    "model": "dummy:135m",
    "tokenizer": "somewhere",
    "load_format": "dummy",
    "dtype": "float32",
    "max_model_len": "4096",
    "device": "cpu",
    "cpu_threads": "1",
    "page_size": "16",
}


@pytest.mark.parametrize("effort", ["quick", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PARTS)
def test_every_call_is_one_that_the_benchmark_takes(name: str, device: str, effort: Effort) -> None:
    module = import_module(f"tessera.commands.bench.{name}")
    parser = Parser(prog=name)
    module.add_flags(parser)
    options = CompareOptions(backends="naive,flash_attn:4+triton", effort=effort, resume=True)
    engine = {setting: value for setting, value in ENGINE.items() if setting != "tokenizer" or name != "offline"}
    (stage,) = stages(options, [name], device, engine, "folder")
    args, unknown = parser.parse_known_args(stage.arguments)
    assert not unknown
    assert args.out == f"folder/{name}.jsonl" and args.resume is True
    assert name == "ttft" or args.backends == ("naive,flash_attn:4,triton" if name == "kernels" else options.backends)
    assert "dummy:135m" in (getattr(args, "models", None), getattr(args, "model", None))
    assert "float32" in (getattr(args, "dtypes", None), getattr(args, "dtype", None))


def test_one_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    bad, good = Stage("offline", ["--repeats", "0"]), Stage("kernels", ["--help"])
    outcomes = run_stages([bad, good], tmp_path)
    assert [outcome.code for outcome in outcomes] == [2, 0]
    assert "ended with exit code 2" in outcomes[0].line
    assert "attention kernels alone" in (tmp_path / "kernels.txt").read_text()


def test_a_comparison_reports_and_goes_on_without_measuring_twice(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    command = ("--only", "kernels", "--backends", "naive,torch_sdpa:math", "--folder", str(folder), "--device", "cpu")
    first = _tessera(*command)
    assert first.returncode == 0, first.stderr
    assert "report.html" in first.stdout and (folder / "report.html").exists() and (folder / "report.md").exists()
    rows = read(folder / "kernels.jsonl")
    assert {row.subject.label for row in rows if row.kind == "kernels"} == {"naive", "torch_sdpa:math"}
    again = _tessera(*command, "--resume")
    assert again.returncode == 0, again.stderr
    assert [row for row in read(folder / "kernels.jsonl") if row.kind == "kernels"] == [
        row for row in rows if row.kind == "kernels"
    ]


def test_ctrl_c_ends_one_leaves_out_the_rest_and_reports_what_is_there(tmp_path: Path) -> None:
    """As a terminal sends it, to all processes at once."""
    flags = "--only kernels,quality --backends naive,torch_sdpa:math --effort full --device cpu --cpu-threads 1"
    command = [sys.executable, "-m", "tessera.cli", "bench", "compare", *flags.split(), "--folder", str(tmp_path / "f")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    rows, deadline = tmp_path / "f" / "kernels.jsonl", time.monotonic() + 60
    while not (rows.exists() and b"naive" in rows.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "kernels: interrupted after" in said and "quality" not in said
    assert "naive" in (tmp_path / "f" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "kernels,ofline"], "--only has 'ofline'"),
        (["--resume"], "none is named"),
        (["--folder", "full"], "has rows already"),
        (["--folder", "file"], "is a file"),
        (["--backends", "nosuch"], "unknown attention backend 'nosuch'"),
        (["--effort", "huge"], "invalid choice: 'huge'"),
        (["--attention", "naive"], "unknown flag"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kernels.jsonl").touch()
    (tmp_path / "file").touch()
    assert cli.main(["bench", "compare", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and "hint:" in said
    assert not (tmp_path / "results").exists()


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "compare", "--help"])
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--effort", "--only", "--folder", "--resume", "--backends", "--page-size"))


def _tessera(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tessera.cli", "bench", "compare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=dict(os.environ))


def test_options_are_checked() -> None:
    args = argparse.Namespace(effort="huge")
    from tessera.commands.flags import read_section

    with pytest.raises(ConfigError, match="effort must be one of quick, full"):
        read_section(args, CompareOptions)
