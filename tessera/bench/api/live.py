"""The sweep as it runs: a table on stderr that fills, or a line a row where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tessera.bench.api.tables import plain
from tessera.bench.benchmark import Benchmark, measure
from tessera.bench.progress import TimeLeft
from tessera.bench.record import Record


def run_live(benchmark: Benchmark, path: Path, *, resume: bool = False, console: Console | None = None) -> list[Record]:
    """Run to the end with the table in sight, every row on disk as soon as there is one; the rows."""
    console = console or Console(file=sys.stderr)
    rows: list[Record] = []
    time_left = TimeLeft(benchmark.num_records)
    if not console.is_terminal:
        for row in measure(benchmark, path, resume=resume):
            rows.append(row)
            said = " ".join(plain([row])[1]) + time_left.after(row)
            console.file.write(f"{benchmark.kind} {len(rows)}/{benchmark.num_records} {said}\n")
            console.file.flush()
        return rows
    began = time.monotonic()
    empty = _table(rows, benchmark, began, "; starting")
    with Live(empty, console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for row in measure(benchmark, path, resume=resume):
            rows.append(row)
            live.update(_table(rows, benchmark, began, time_left.after(row)), refresh=True)
    return rows


def _table(rows: list[Record], benchmark: Benchmark, began: float, left: str) -> Table:
    total, passed = benchmark.num_records, time.monotonic() - began
    heads, *cells = plain(rows)
    table = Table(caption=f"{len(rows)} of {total} rows, {passed:.0f} s{left}", caption_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number in (0, len(heads) - 1) else "right")
    for row in cells:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    return table
