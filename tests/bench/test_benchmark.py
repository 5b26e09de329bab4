"""How a benchmark is run: rows on disk at once, and a later run that goes on where one stopped."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from synthetic_rows import row, subject, where
from tessera.bench import benchmark
from tessera.bench.benchmark import Done
from tessera.bench.progress import TimeLeft
from tessera.bench.provenance import command_line, provenance
from tessera.bench.record import Kind, Record, read
from tessera.commands.bench.command import run as run_command
from tessera.errors import ConfigError


class Counting:
    """Three repeats; stops as if it were killed before repeat `dies_at`."""

    kind: Kind = "offline"
    num_records = 3

    def __init__(self, dies_at: int | None = None) -> None:
        self.measured: list[int] = []
        self._dies_at = dies_at
        self.provenance = provenance()

    def records(self, done: Container[Done] = ()) -> Iterator[Record]:
        for repeat in range(3):
            made = row("offline", subject("naive"), {"workload": "w"}, {"output_tok_s": 12.34}, repeat=repeat)
            made = Record(**(made.__dict__ | {"provenance": self.provenance}))
            if Done(made.case_key, "naive", repeat) in done:
                continue
            if repeat == self._dies_at:
                raise KeyboardInterrupt
            self.measured.append(repeat)
            yield made


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tessera", "bench", "offline", "--repeats", "3"])


def test_a_row_is_on_disk_before_the_next_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(Counting(dies_at=2), tmp_path / "rows.jsonl")
    assert "2 rows are in" in (said := capsys.readouterr().err) and "--resume" in said
    assert [each.repeat for each in read(tmp_path / "rows.jsonl")] == [0, 1]


def test_each_row_is_said_with_its_figure_and_the_time_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 60.0, 70.0, 90.0])
    monkeypatch.setattr("tessera.bench.progress.time.monotonic", lambda: next(clock))
    benchmark.run(Counting(), tmp_path / "rows.jsonl")
    assert capsys.readouterr().err.splitlines() == [
        "offline 1/3 naive w: output tok/s 12.34; about 2 min left",
        "offline 2/3 naive w: output tok/s 12.34; about 35 s left",
        "offline 3/3 naive w: output tok/s 12.34",
    ]


def test_rows_from_before_take_no_time_and_those_that_cannot_run_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.bench.progress.time.monotonic", iter([0.0, 0.1, 60.0, 61.0]).__next__)
    left = TimeLeft(9)
    old, new = (replace(row("offline", subject("naive"), {}, {}), provenance=made) for made in (where(), provenance()))
    assert left.after(old) == ""
    assert left.after(new) == "; about 7 min left", "seven rows of 60 s"
    assert left.after(replace(new, status="unavailable", reason="x")) == "; about 3 min left", "two rows took 61 s"


def test_it_goes_on_where_it_stopped_as_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(Counting(dies_at=2), path)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    later = Counting()
    rows = benchmark.run(later, path, resume=True)
    assert later.measured == [2] and [each.repeat for each in rows] == [0, 1, 2]
    assert len({each.provenance.command for each in read(path)}) == 1


def test_without_resume_all_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    benchmark.run(Counting(), path)
    again = Counting()
    benchmark.run(again, path)
    assert again.measured == [0, 1, 2] and len(read(path)) == 6


def test_rows_of_another_command_are_not_taken_for_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    benchmark.run(Counting(), path)
    monkeypatch.setattr(
        sys, "argv", ["tessera", "bench", "offline", "--repeats", "3", "--resume", "--dtype", "float32"]
    )
    other = Counting()
    benchmark.run(other, path, resume=True)
    assert other.measured == [0, 1, 2]


def test_what_goes_on_says_so_and_is_no_pair_of_what_was_before(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(Counting(dies_at=2), path)
    later = Counting()
    later.provenance = replace(later.provenance, run="later")
    rows = benchmark.run(later, path, resume=True)
    assert rows[2].provenance.run == "later" and rows[2].provenance.continues == rows[0].provenance.run
    third = Counting()
    assert [row.repeat for row in benchmark.run(third, path, resume=True)] == [0, 1, 2] and third.measured == []


@pytest.mark.parametrize("changed", [{"versions": {"torch": "1.0"}}, {"commit": "other"}, {"machine": None}])
def test_other_code_versions_or_machines_are_measured_anew(changed: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first = Counting()
    changed = {"machine": replace(first.provenance.machine, cpu="another")} if "machine" in changed else changed
    first.provenance = replace(first.provenance, **changed)
    benchmark.run(first, path)
    again = Counting()
    benchmark.run(again, path, resume=True)
    assert again.measured == [0, 1, 2]


def test_a_row_that_was_cut_off_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    benchmark.run(Counting(), path)
    path.write_bytes(path.read_bytes()[:-40])
    assert [row.repeat for row in read(path)] == [0, 1]
    benchmark.run(Counting(), path)
    assert [row.repeat for row in read(path)] == [0, 1, 0, 1, 2]


def test_a_line_that_is_no_row_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    benchmark.run(Counting(), path)
    path.write_text(path.read_text() + '{"kind": "offline"}\n')
    with pytest.raises(ConfigError, match="line 4 is not a row of a benchmark"):
        read(path)


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = Counting()
    with pytest.raises(ConfigError, match="cannot be written"):
        benchmark.run(refused, tmp_path / "file" / "rows.jsonl")
    assert refused.measured == []


def test_every_benchmark_ends_by_sigterm_as_by_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("tessera.commands.bench.fake")
    before = signal.getsignal(signal.SIGTERM)

    def run(_: argparse.Namespace) -> int:
        assert signal.getsignal(signal.SIGTERM) is not before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        return 7

    monkeypatch.setattr(fake, "run", run, raising=False)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    assert run_command(argparse.Namespace(benchmark="fake")) == 7
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_is_repeated_with_what_decided_which_kernels_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/tessera", "bench", "kernels", "--heads", "4/2/32"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert command_line() == "tessera bench kernels --heads 4/2/32"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command_line() == "TRITON_INTERPRET=1 tessera bench kernels --heads 4/2/32"
