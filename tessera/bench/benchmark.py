"""What every benchmark is: rows in an order, those that are there already left out; and how one is run."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

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


def done_in(path: Path, command: str, commit: str) -> set[Done]:
    """The rows that this command, with this code, has written to a file and that did not fail."""
    if not path.exists():
        return set()
    return {
        Done(row.case_key, row.subject.label, row.repeat)
        for row in read(path)
        if row.status != "failed" and (row.provenance.command, row.provenance.commit) == (command, commit)
    }


def run(benchmark: Benchmark, path: Path, done: Container[Done] = (), *, resumed: int = 0) -> list[Record]:
    """Run to the end, every row on disk as soon as there is one; progress and time left on stderr. Returns the rows."""
    rows = []
    with _Progress(benchmark.kind, benchmark.num_records, resumed) as progress:
        for record in benchmark.records(done):
            append(path, [record])
            rows.append(record)
            progress.advance(record)
    return rows


class _Progress:
    """A bar with the time left on a terminal, a line a row elsewhere."""

    def __init__(self, what: str, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn

        console = Console(file=sys.stderr)
        self._plain = not console.is_terminal
        columns = (TextColumn("{task.fields[what]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        text = TextColumn("left, {task.description}", markup=False)
        self._bar = Progress(*columns, TimeRemainingColumn(), text, console=console, disable=self._plain)
        self._task = self._bar.add_task("starting", total=total, completed=done, what=what)
        self._what, self._total, self._count = what, total, done

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
