"""How benchmarks of servers take turns: who is measured when, and what becomes of a server that fails.

A server is alone on the machine: one of ours is started for a repeat and stopped after it, unless all are to be kept:
then each is started once, and those whose turn it is not stand idle beside the one that is measured. Every second
repeat takes targets and cells in reverse order, so that none always comes first. What is compared was measured in one
run: a case that `done` has for some targets only is measured for all of its group.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Protocol, TypeVar

from tessera.bench.benchmark import Done
from tessera.bench.record import Record, Subject
from tessera.bench.served.servers import Server
from tessera.errors import TesseraError
from tessera.log import logger


class Startable(Protocol):
    """What a server is, before it is up."""

    @property
    def label(self) -> str:
        """As in tables."""

    @property
    def about(self) -> str:
        """What is started: `tessera serve --model=...`; '' where nothing is."""

    @property
    def reasons(self) -> Sequence[str]:
        """Why it cannot serve here."""

    def start(self) -> tuple[Server, Subject]:
        """A server, ready, and what it runs; TesseraError where it does not come up."""


TargetT = TypeVar("TargetT", bound=Startable, contravariant=True)
CellT = TypeVar("CellT")


class Visits(Protocol[TargetT, CellT]):
    """What a benchmark of servers knows of itself; a cell is what gives one row of one target in one repeat."""

    def cells(self, target: TargetT) -> Sequence[CellT]:
        """What is to be measured at this target, in the order of the first repeat."""

    def blank(self, target: TargetT, repeat: int, cell: CellT, reason: str) -> Record:
        """The failed row of a target of which nothing is known."""

    def ready(self, target: TargetT, repeat: int, server: Server, subject: Subject) -> Callable[[CellT], Record]:
        """Warm a server up and say how a cell is measured at it; both may raise TesseraError."""


class _Kept:
    """Servers that stay up, by label, until this is closed."""

    def __init__(self) -> None:
        self._up: dict[str, tuple[Server, Subject]] = {}

    def get(self, target: Startable) -> tuple[Server, Subject]:
        """The target's server, started when it is first wanted; TesseraError where it does not come up."""
        if target.label not in self._up:
            self._up[target.label] = _started(target)
        return self._up[target.label]

    def drop(self, target: Startable) -> None:
        """Stop the target's server, if there is one; it is started anew when it is wanted again."""
        if found := self._up.pop(target.label, None):
            found[0].stop()

    def close(self) -> None:
        """Stop all."""
        for server, _ in self._up.values():
            server.stop()


def records_in_turns(
    visits: Visits[TargetT, CellT],
    groups: Sequence[Sequence[TargetT]],
    repeats: int,
    done: Container[Done],
    *,
    keep_servers: bool = False,
) -> Iterator[Record]:
    """The rows as they are measured, without `done`; targets of one group are compared with one another."""
    kept = _Kept() if keep_servers else None
    try:
        for repeat in range(repeats):
            for group in groups:
                yield from _round(visits, group, repeat, done, kept)
    finally:
        if kept:
            kept.close()


def _round(
    visits: Visits[TargetT, CellT],
    targets: Sequence[TargetT],
    repeat: int,
    done: Container[Done],
    kept: _Kept | None,
) -> Iterator[Record]:
    """One repeat of all targets of a group."""
    step = -1 if repeat % 2 else 1
    places = [
        (target, [(cell, _name(visits.blank(target, repeat, cell, "-"))) for cell in visits.cells(target)[::step]])
        for target in targets[::step]
    ]
    of_any = {name.case_key for target, cells in places for _, name in cells if not target.reasons and name not in done}
    for target, cells in places:
        left = [cell for cell, name in cells if (name not in done if target.reasons else name.case_key in of_any)]
        if left:
            yield from _visit(visits, target, repeat, left, kept)


def _name(row: Record) -> Done:
    return Done(row.case_key, row.subject.label, row.repeat)


def _visit(
    visits: Visits[TargetT, CellT], target: TargetT, repeat: int, cells: Sequence[CellT], kept: _Kept | None
) -> Iterator[Record]:
    """The rows of one target in one repeat, whatever its server does."""
    if target.reasons:
        for cell in cells:
            yield replace(visits.blank(target, repeat, cell, "; ".join(target.reasons)), status="unavailable")
        return
    left = list(cells)
    try:
        server, subject = kept.get(target) if kept else _started(target)
        with nullcontext() if kept else server:
            measured = visits.ready(target, repeat, server, subject)
            while left:
                row = measured(left[0])
                left.pop(0)
                yield row
    except TesseraError as error:
        if kept:
            kept.drop(target)
        for cell in left:
            yield visits.blank(target, repeat, cell, str(error).replace("\n\n", " "))


def _started(target: Startable) -> tuple[Server, Subject]:
    """A server, its start told on stderr: a model may take minutes to load and prove."""
    if not target.about:
        return target.start()
    began = time.monotonic()
    _say(f"starting a server for {target.label}: {target.about}")
    server, subject = target.start()
    _say(f"the server for {target.label} is up after {time.monotonic() - began:.1f} s")
    return server, subject


def _say(line: str) -> None:
    """By the current sys.stderr, which a progress bar that is on screen stands in for, unlike the log's."""
    if logger.isEnabledFor(logging.INFO):
        sys.stderr.write(line + "\n")
