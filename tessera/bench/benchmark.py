"""What every benchmark is: rows in an order, those that are there already left out; and how one is run."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from tessera.bench.provenance import Provenance, command_line, commit
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
    """The rows as they come, every one on disk before it is yielded.

    With `resume`, what this command, with this code, has written to `path` and did not fail is not measured again but
    comes first, and the new rows count as of the same run.
    """
    before = _rows_of_this_command(path) if resume else []
    yield from before
    for measured in benchmark.records({Done(row.case_key, row.subject.label, row.repeat) for row in before}):
        record = _continued(measured, before[-1].provenance) if before else measured
        append(path, [record])
        yield record


def run(benchmark: Benchmark, path: Path, *, resume: bool = False) -> list[Record]:
    """`measure` to the end, with progress and time left on stderr; the rows."""
    rows = []
    with _Progress(benchmark.kind, benchmark.num_records) as progress:
        for record in measure(benchmark, path, resume=resume):
            rows.append(record)
            progress.advance(record)
    return rows


def _rows_of_this_command(path: Path) -> list[Record]:
    """Those of its last run, but for the failed."""
    if not path.exists():
        return []
    command, code = _without_resume(command_line()), commit()
    rows = [
        row for row in read(path) if (_without_resume(row.provenance.command), row.provenance.commit) == (command, code)
    ]
    return [row for row in rows if row.provenance.run == rows[-1].provenance.run and row.status != "failed"]


def _without_resume(command: str) -> str:
    return " ".join(word for word in command.split() if word != "--resume")


def _continued(record: Record, begun: Provenance) -> Record:
    """As of the run that was begun before: reports compare what one command measured in one run."""
    return replace(record, provenance=replace(record.provenance, run=begun.run, command=begun.command))


class _Progress:
    """A bar with the time left on a terminal, a line a row elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(file=sys.stderr)
        self._plain = not console.is_terminal
        columns = (TextColumn("{task.fields[what]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        text = TextColumn("left, {task.description}", markup=False)
        self._bar = Progress(*columns, TimeRemainingColumn(), text, console=console, disable=self._plain)
        self._task = self._bar.add_task("starting", total=total, what=what)
        self._what, self._total, self._count = what, total, 0

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, record: Record) -> None:
        """One row more."""
        self._count += 1
        about = f"{record.subject.label} {' '.join(str(value) for value in record.case.values())}"
        outcome = "" if record.status == "ok" else f" {record.status}: {record.reason:.120}"
        self._bar.update(self._task, advance=1, description=about)
        if self._plain:
            sys.stderr.write(f"{self._what} {self._count}/{self._total} {about}{outcome}\n")
        elif outcome:
            self._bar.console.print(about + outcome, markup=False, highlight=False)
