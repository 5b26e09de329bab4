"""What is seen of a benchmark while it runs."""

from __future__ import annotations

import sys
import time

from tessera.bench.provenance import provenance
from tessera.bench.reasons import gathered, plain_reason
from tessera.bench.record import Record
from tessera.bench.report.metrics import HEADLINES, number, title


class TimeLeft:
    """How long the rest of `total` rows takes, if its rows take as long as those of this run before them.

    Rows that cannot be measured take no time and count like others; those of a run that is continued do not count.
    """

    def __init__(self, total: int) -> None:
        self._total, self._count, self._num_fresh = total, 0, 0
        self._run, self._begun = provenance().run, time.monotonic()

    def after(self, record: Record) -> str:
        """`; about 20 s left` once this row is there; empty where nothing is left or known."""
        self._count += 1
        self._num_fresh += record.provenance.run == self._run
        seconds = (time.monotonic() - self._begun) / max(1, self._num_fresh) * (self._total - self._count)
        if seconds < 1 or not self._num_fresh:
            return ""
        return f"; about {seconds:.0f} s left" if seconds < 100 else f"; about {seconds / 60:.0f} min left"


class Progress:
    """A line a row with its first figures; and, on a terminal a bar with the time left, elsewhere that in each line."""

    def __init__(self, what: str, total: int) -> None:
        from rich import progress as bars
        from rich.console import Console

        console = Console(file=sys.stderr)
        self._plain = not console.is_terminal
        counted = (bars.TextColumn("{task.fields[what]}"), bars.BarColumn(), bars.MofNCompleteColumn())
        text = bars.TextColumn("left, {task.description}", markup=False)
        columns = (*counted, bars.TimeElapsedColumn(), bars.TimeRemainingColumn(), text)
        self._bar = bars.Progress(*columns, console=console, disable=self._plain)
        self._task = self._bar.add_task("starting", total=total, what=what)
        self._what, self._total, self._count = what, total, 0
        self._left = TimeLeft(total)
        self._held: list[Record] = []
        self._said: set[tuple[str, str]] = set()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._say_held()
        self._bar.stop()

    def advance(self, record: Record) -> None:
        """One row more. Those that are unavailable cost no time and are held, to be said in a line a reason."""
        left = self._left.after(record)
        if record.status == "unavailable":
            self._held.append(record)
            self._bar.update(self._task, advance=1)
            return
        self._say_held()
        self._count += 1
        about = f"{record.subject.label} {' '.join(str(value) for value in record.case.values())}"
        outcome = _figures(record) if record.status == "ok" else f"{record.status}: {record.reason:.120}"
        self._bar.update(self._task, advance=1, description=about)
        if self._plain:
            self._say(f"{self._counted} {about}: {outcome}{left}")
        else:
            self._say(f"{about}: {outcome}")

    def _say_held(self) -> None:
        """Those that share a reason in one line; of a backend that was said not to run here for it, not again."""
        fresh = [row for row in self._held if (row.subject.label, plain_reason(row)) not in self._said]
        self._count += len(self._held)
        self._said |= {(row.subject.label, plain_reason(row)) for row in fresh}
        self._held.clear()
        for each in gathered(fresh):
            self._say(f"{self._counted} {each.line}" if self._plain else each.line)

    @property
    def _counted(self) -> str:
        return f"{self._what} {self._count}/{self._total}"

    def _say(self, line: str) -> None:
        if self._plain:
            sys.stderr.write(line + "\n")
        else:
            self._bar.console.print(line, markup=False, highlight=False)


def _figures(record: Record) -> str:
    """What a report says first of a row's kind."""
    names = [name for name in HEADLINES.get(record.kind, ()) if name in record.metrics] or list(record.metrics)[:2]
    return ", ".join(f"{title(name)} {number(name, record.metrics[name])}" for name in names)
