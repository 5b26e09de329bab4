"""How servers take turns: each alone and anew for a repeat, or all kept up, and a broken one started again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from synthetic_rows import where
from tessera.bench.record import Conditions, Record, Subject
from tessera.bench.served.servers import Server
from tessera.bench.served.turns import records_in_turns
from tessera.errors import TesseraError


def make_row(label: str, repeat: int, cell: str, reason: str) -> Record:
    return Record("api", {"cell": cell}, Subject(label), "failed", Conditions(), where(), repeat, reason=reason)


class Stoppable(Server):
    """A server that says when it is stopped."""

    def __init__(self, label: str, log: list[str]) -> None:
        super().__init__("http://nowhere/v1")
        self.label, self.log = label, log

    def stop(self) -> None:
        self.log.append(f"stop {self.label}")


@dataclass
class Target:
    label: str
    log: list[str]
    about: str = ""
    reasons: Sequence[str] = ()

    def start(self) -> tuple[Server, Subject]:
        self.log.append(f"start {self.label}")
        return Stoppable(self.label, self.log), Subject(self.label)


@dataclass
class Visits:
    """One cell a target; measuring is logged, and fails where told."""

    log: list[str]
    fails: set[tuple[str, int]] = field(default_factory=set)

    def cells(self, _: Target) -> Sequence[str]:
        return ["cell"]

    def blank(self, target: Target, repeat: int, cell: str, reason: str) -> Record:
        return make_row(target.label, repeat, cell, reason)

    def ready(self, target: Target, repeat: int, _server: Server, _subject: Subject) -> Callable[[str], Record]:
        def measured(cell: str) -> Record:
            if (target.label, repeat) in self.fails:
                raise TesseraError("the server broke")
            self.log.append(f"{target.label} {repeat}")
            return make_row(target.label, repeat, cell, "-")

        return measured


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (
            False,
            "start a,a 0,stop a,start b,b 0,stop b,start b,b 1,stop b,start a,a 1,stop a",
        ),
        (True, "start a,a 0,start b,b 0,b 1,a 1,stop a,stop b"),
    ],
)
def test_servers_are_started_for_each_repeat_or_kept_to_the_end(keep: bool, expected: str) -> None:
    log: list[str] = []
    targets = [Target("a", log), Target("b", log)]
    assert len(list(records_in_turns(Visits(log), [targets], 2, (), keep_servers=keep))) == 4
    assert log == expected.split(",")


def test_a_kept_server_that_breaks_is_stopped_and_started_anew() -> None:
    log: list[str] = []
    rows = list(records_in_turns(Visits(log, {("a", 0)}), [[Target("a", log)]], 3, (), keep_servers=True))
    assert [row.reason for row in rows] == ["the server broke", "-", "-"]
    assert log == ["start a", "stop a", "start a", "a 1", "a 2", "stop a"]


def test_kept_servers_are_stopped_when_the_run_is_left() -> None:
    log: list[str] = []
    rows = records_in_turns(Visits(log), [[Target("a", log)]], 3, (), keep_servers=True)
    next(rows)
    rows.close()  # type: ignore[attr-defined]
    assert log[-1] == "stop a"
