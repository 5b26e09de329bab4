"""How a benchmark is run: rows on disk at once, and a later run that goes on where one stopped."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

from synthetic_rows import row, subject
from tessera.bench import benchmark
from tessera.bench.benchmark import Done
from tessera.bench.provenance import provenance
from tessera.bench.record import Kind, Record, read


class Counting:
    """Three repeats; stops as if it were killed before repeat `dies_at`."""

    kind: Kind = "offline"
    num_records = 3

    def __init__(self, dies_at: int | None = None) -> None:
        self.measured: list[int] = []
        self._dies_at = dies_at
        self._provenance = provenance()

    def records(self, done: Container[Done] = ()) -> Iterator[Record]:
        for repeat in range(3):
            made = row("offline", subject("naive"), {"workload": "w"}, {"req_s": 1.0}, repeat=repeat)
            made = Record(**(made.__dict__ | {"provenance": self._provenance}))
            if Done(made.case_key, "naive", repeat) in done:
                continue
            if repeat == self._dies_at:
                raise KeyboardInterrupt
            self.measured.append(repeat)
            yield made


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tessera", "bench", "offline", "--repeats", "3"])


def test_a_row_is_on_disk_before_the_next_is_measured(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(Counting(dies_at=2), tmp_path / "rows.jsonl")
    assert [each.repeat for each in read(tmp_path / "rows.jsonl")] == [0, 1]


def test_it_goes_on_where_it_stopped_as_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(Counting(dies_at=2), path)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    later = Counting()
    rows = benchmark.run(later, path, resume=True)
    assert later.measured == [2] and [each.repeat for each in rows] == [0, 1, 2]
    assert len({(each.provenance.run, each.provenance.command) for each in read(path)}) == 1


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
