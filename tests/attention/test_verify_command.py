"""`tessera verify`: what it prints and its exit codes."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any, ClassVar

import pytest
import torch

from mutants import NotInstalled
from tessera import cli
from tessera.attention import registry


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints(
        EntryPoint(name, path, "tessera.attention")
        for name, path in {
            "mutant": "mutants:IgnoresWindow",
            "mutant:absent": f"{__name__}:Absent",
            "mutant:gone": "no_such_package:Backend",
        }.items()
    )
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points.select(group=group))


class Absent(NotInstalled):
    name: ClassVar[str] = "mutant:absent"
    install: ClassVar[str | None] = "pip install no-such-wheel"


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, list[dict[str, Any]], str]:
    code = cli.main(["verify", *args, "--device", "cpu", "--json"])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def test_command_exits_0_where_every_claim_holds(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, err = run(capsys, "naive", "--phase", "decode", "--dtype", "float32")
    assert code == 0
    assert "checking decode float32" in err
    assert lines[-1]["summary"]["ok"] and not lines[-1]["summary"]["unavailable"]
    assert lines[-1]["summary"]["versions"] == {"torch": torch.__version__}
    assert {line["check"] for line in lines[:-1] if line["check"].startswith("engine/")} == {
        "engine/greedy_tokens",
        "engine/greedy_tokens_with_window",
    }


@pytest.mark.usefixtures("registered")
def test_command_exits_1_and_the_engine_shows_other_tokens_where_the_window_is_ignored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, lines, _ = run(capsys, "mutant", "--phase", "prefill", "--dtype", "float32")
    assert code == 1
    failed = {line["check"]: line["detail"] for line in lines[:-1] if line["outcome"] == "fail"}
    assert "workload/window_with_chunk" in failed
    assert (
        "with a window of 24 come before the first that differs from naive's"
        in failed["engine/greedy_tokens_with_window"]
    )


@pytest.mark.usefixtures("registered")
def test_command_exits_3_with_the_reasons_where_the_library_is_absent(capsys: pytest.CaptureFixture[str]) -> None:
    code, (line,), _ = run(capsys, "mutant:absent", "--dtype", "float32")
    assert code == 3
    summary = line["summary"]
    assert summary["unavailable"] and not summary["ok"] and summary["passed"] == summary["failed"] == 0
    assert summary["reasons"] == ["no_such_module_of_ours is not installed"]
    assert summary["hint"] == "pip install no-such-wheel"
    assert cli.main(["verify", "mutant:absent", "--device", "cpu"]) == 3
    assert capsys.readouterr().out == (
        "mutant:absent cannot be used here on cpu, nothing was checked:\n"
        "  no_such_module_of_ours is not installed\n"
        "\n"
        "hint: pip install no-such-wheel\n"
    )


@pytest.mark.usefixtures("registered")
def test_command_exits_3_where_the_plug_in_does_not_import(capsys: pytest.CaptureFixture[str]) -> None:
    code, (line,), _ = run(capsys, "mutant:gone")
    assert code == 3 and line["summary"]["unavailable"]
    assert "No module named 'no_such_package'" in line["summary"]["reasons"][0]


def test_a_library_for_another_device_is_offered_for_installation_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, (line,), _ = run(capsys, "triton")
    assert (code, line["summary"]["hint"]) == (3, "verify it on a machine with cuda")
    code, (line,), _ = run(capsys, "flash_attn:2")
    assert code == 3 and line["summary"]["hint"].endswith("on a machine with cuda")


def test_a_phase_that_it_does_not_serve_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "triton:fa1", "--phase", "decode"]) == 2
    assert capsys.readouterr().err.strip().startswith("error: triton:fa1 has no decode kernel\n\nhint: use --phase")


def test_auto_is_no_backend_to_verify(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, err = run(capsys, "auto")
    assert (code, lines) == (2, []) and "auto is no attention backend" in err
    code, _, err = run(capsys, "nosuch")
    assert code == 2 and "there are: flash_attn:4" in err and "auto" not in err


def test_command_exits_2_for_an_unknown_name_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, err = run(capsys, "naiv")
    assert (code, lines) == (2, [])
    assert "unknown attention backend 'naiv', there are: " in err and "hint: did you mean naive?" in err
