"""What every benchmark is: rows in an order, those that are there already left out; and how one is run."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from tessera.bench.places import check_file
from tessera.bench.progress import Progress
from tessera.bench.provenance import Provenance, provenance
from tessera.bench.record import Kind, Record, append, read


class Done(NamedTuple):
    """Names a row: one repeat of one case by one subject."""

    case_key: str
    label: str
    repeat: int


class Benchmark(Protocol):
    """Something that measures; made by its options, runs nothing until `records` is asked for rows."""

    kind: Kind

    @property
    def num_records(self) -> int:
        """How many rows there will be in all, failed ones included."""

    def records(self, done: Container[Done] = ()) -> Iterator[Record]:
        """Measure and yield row by row, all subjects in turn; leaves out `done`.

        What fails is a row that says why and never ends the others; only a TesseraError that concerns the whole
        benchmark (a model that does not exist) is raised.
        """


def measure(benchmark: Benchmark, path: Path, *, resume: bool = False) -> Iterator[Record]:
    """The rows as they come, every one on disk before it is yielded; ConfigError, at once, where none can be.

    With `resume`, what this command measured before, with this code and these versions on this machine, is not measured
    again but comes first, and the new rows say that they continue it.
    """
    check_file("--out", path)
    before = _rows_of_this_command(path) if resume else []
    yield from before
    num_rows = len(before)
    try:
        for measured in benchmark.records({Done(row.case_key, row.subject.label, row.repeat) for row in before}):
            record = _continuing(measured, before[-1].provenance) if before else measured
            append(path, [record])
            num_rows += 1
            yield record
    except KeyboardInterrupt:
        sys.stderr.write(f"\ninterrupted: {num_rows} rows are in {path}, the same command with --resume goes on\n")
        raise


def run(benchmark: Benchmark, path: Path, *, resume: bool = False) -> list[Record]:
    """`measure` to the end, with progress and time left on stderr; the rows."""
    rows = []
    with Progress(benchmark.kind, benchmark.num_records) as progress:
        for record in measure(benchmark, path, resume=resume):
            rows.append(record)
            progress.advance(record)
    return rows


def _rows_of_this_command(path: Path) -> list[Record]:
    """Those that are ok, of its last run and of what that continued."""
    now = provenance()
    rows = [row for row in read(path) if _made_by(row.provenance) == _made_by(now)]
    return [row for row in rows if _first_run(row) == _first_run(rows[-1]) and row.status == "ok"]


def _made_by(where: Provenance) -> tuple[object, ...]:
    """All that decides what a row says, but for chance."""
    command = [word for word in where.command.split() if word != "--resume"]
    return command, where.commit, where.versions, where.machine


def _first_run(row: Record) -> str:
    return row.provenance.continues or row.provenance.run


def _continuing(record: Record, begun: Provenance) -> Record:
    """As of the command that was begun before, whose run it names."""
    where = replace(record.provenance, continues=begun.continues or begun.run, command=begun.command)
    return replace(record, provenance=where)
