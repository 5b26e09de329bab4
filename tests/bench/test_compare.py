"""`tessera bench compare`: its calls are ones that the benchmarks take, it goes on where it stopped, and it reports."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest

from tessera import cli
from tessera.bench.compare.run import GRACE_SECONDS, Outcome, run_stages
from tessera.bench.compare.stages import PARTS, CompareOptions, Effort, Stage, stages, without_choosers
from tessera.bench.record import read
from tessera.bench.subjects import Wanted
from tessera.commands.flags import Parser
from tessera.errors import ConfigError

ENGINE: dict[str, str | bool] = {
    "model": "dummy:135m",
    "tokenizer": "somewhere",
    "load_format": "dummy",
    "dtype": "float32",
    "max_model_len": "4096",
    "device": "cpu",
    "cpu_threads": "1",
    "cpu_four_bits": False,
    "page_size": "16",
}


@pytest.mark.parametrize("effort", ["quick", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PARTS)
def test_every_call_is_one_that_the_benchmark_takes(name: str, device: str, effort: Effort) -> None:
    module = import_module(f"tessera.commands.bench.{name}")
    parser = Parser(prog=name)
    module.add_flags(parser)
    options = CompareOptions(backends="naive,naive#2,flash_attn:4+triton", effort=effort, resume=True)
    engine = {setting: value for setting, value in ENGINE.items() if setting != "tokenizer" or name != "offline"}
    (stage,) = stages(options, [name], device, engine, "folder")
    args, unknown = parser.parse_known_args(stage.arguments)
    assert not unknown
    assert args.out == f"folder/{name}.jsonl" and args.resume is True
    assert name == "ttft" or args.backends == ("naive,flash_attn:4,triton" if name == "kernels" else options.backends)
    assert getattr(args, "cpu_four_bits", None) is (None if name == "kernels" else False)
    assert "dummy:135m" in (getattr(args, "models", None), getattr(args, "model", None))
    assert "float32" in (getattr(args, "dtypes", None), getattr(args, "dtype", None))


def test_on_a_cpu_what_only_chooses_among_the_others_is_not_measured_a_second_time() -> None:
    wanted = [Wanted(name, name) for name in ("auto", "naive", "torch_sdpa", "torch_sdpa:flash")]
    assert [each.label for each in without_choosers(wanted)] == ["naive", "torch_sdpa:flash"]
    none = [*wanted[:3], Wanted("torch_sdpa:flash", "torch_sdpa:flash", ["needs a GPU"])]
    assert [each.label for each in without_choosers(none)] == ["naive", "torch_sdpa", "torch_sdpa:flash"]


def test_what_compiles_too_long_is_left_out_of_one_benchmark_where_nobody_named_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told: dict[str, str] = {}

    def note(found: list[Stage], _: Path) -> list[Outcome]:
        told.update({stage.name: stage.arguments[stage.arguments.index("--backends") + 1] for stage in found})
        return []

    monkeypatch.setattr("tessera.bench.compare.run.run_stages", note)
    monkeypatch.setattr("tessera.bench.compare.run.make_report", lambda *_: 0)
    flags = ["bench", "compare", "--only", "online,api", "--device", "cpu", "--folder", str(tmp_path / "f")]
    assert cli.main(flags) == 0
    online, api = (told[name].split(",") for name in ("online", "api"))
    assert "flex" in online and {"auto", "torch_sdpa"}.isdisjoint(online)
    assert api == [name for name in online if name != "flex"] and "api does without flex" in capsys.readouterr().err
    assert cli.main([*flags, "--backends", "naive,flex"]) == 0
    assert set(told.values()) == {"naive,flex"} and "does without" not in capsys.readouterr().err


def test_one_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    bad, good = Stage("offline", ["--repeats", "0"]), Stage("kernels", ["--help"])
    outcomes = run_stages([bad, good], tmp_path)
    assert [outcome.code for outcome in outcomes] == [2, 0]
    assert "ended with exit code 2" in outcomes[0].line
    assert "attention kernels alone" in (tmp_path / "kernels.txt").read_text()


def test_a_comparison_measures_what_it_is_told_and_goes_on_without_measuring_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "made"
    flags = ("--only", "kernels", "--backends", "naive,torch_sdpa:math", "--folder", str(folder), "--device", "cpu")
    monkeypatch.setattr("tessera.bench.compare.run.make_report", lambda *_: 0)  # the next test has one
    assert cli.main(["bench", "compare", *flags]) == 0
    assert f"report: {folder}/report.html" in capfd.readouterr().out
    rows = read(folder / "kernels.jsonl")
    assert {row.subject.label for row in rows if row.kind == "kernels"} == {"naive", "torch_sdpa:math"}
    assert cli.main(["bench", "compare", *flags, "--resume"]) == 0
    assert read(folder / "kernels.jsonl") == rows
    assert f"kernels {len(rows)}/{len(rows)}" in capfd.readouterr().err


def test_ctrl_c_ends_one_leaves_out_the_rest_and_reports_what_is_there(tmp_path: Path) -> None:
    """As a terminal sends it, to all processes at once."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs in a shell's background ignores it
    flags = "--only kernels,quality --backends naive,torch_sdpa:math --effort full --device cpu --dtype float32"
    command = [sys.executable, "-m", "tessera.cli", "bench", "compare", *flags.split(), "--folder", str(tmp_path / "f")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    signal.signal(signal.SIGINT, previous)
    rows, deadline = tmp_path / "f" / "kernels.jsonl", time.monotonic() + 60
    try:
        while not (rows.exists() and b'"label":"naive"' in rows.read_bytes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and "kernels: interrupted after" in said and "quality" not in said
    report = (tmp_path / "f" / "report.md").read_text()
    assert "naive" in report and f"tessera bench report {tmp_path / 'f'}" in report
    assert (tmp_path / "f" / "report.html").exists()


STAGE = """
import sys, tempfile, time
with tempfile.TemporaryDirectory(dir=sys.argv[1]):
    time.sleep(60)
"""
STAGES = """
import sys
from pathlib import Path
from tessera.bench.compare import run
from tessera.bench.compare.stages import Stage
folder = Path(sys.argv[2])
run._command = lambda words: [sys.executable, "-c", sys.argv[1], str(folder)]
print([outcome.code for outcome in run.run_stages([Stage("kernels", []), Stage("quality", [])], folder)])
"""


@pytest.mark.parametrize("behind", [False, True])
def test_sigterm_ends_the_one_that_runs_and_leaves_no_folder_behind(behind: bool, tmp_path: Path) -> None:
    """As `kill` and `timeout` send it, to the comparison alone; what a shell runs with & ignores SIGINT itself."""

    def begin() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN if behind else signal.SIG_DFL)

    words, began = [sys.executable, "-c", STAGES, STAGE, str(tmp_path)], time.monotonic()
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=begin
    ) as process:
        while not any(path.is_dir() for path in tmp_path.iterdir()) and time.monotonic() < began + 30:
            time.sleep(0.02)
        time.sleep(0.3)  # until it sleeps: an interrupt within a callback of Python's own is lost
        process.terminate()
        assert process.communicate(timeout=GRACE_SECONDS / 2)[0] == "[130]\n"
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "kernels,ofline"], "--only has 'ofline'"),
        (["--resume"], "none is named"),
        (["--folder", "full"], "has rows already"),
        (["--folder", "file"], "--folder file is a file"),
        (["--folder", "file/below"], "--folder file/below cannot be written: file is a file"),
        (["--folder", "/proc/none"], "--folder /proc/none cannot be written: "),
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


def test_options_are_checked() -> None:
    args = argparse.Namespace(effort="huge")
    from tessera.commands.flags import read_section

    with pytest.raises(ConfigError, match="effort must be one of quick, full"):
        read_section(args, CompareOptions)
