"""Rows in order: which may be compared with one another, and how each subject is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import msgspec

from tessera.bench.provenance import Machine
from tessera.bench.record import Record, Subject, Value

Pair = tuple[str, int]
"""The run that measured, and a repeat: values of two subjects that share one were measured side by side."""


@dataclass(frozen=True)
class Style:
    """How a subject is drawn, everywhere in a report."""

    color: int
    """Index into the palette."""
    marker: str
    """As matplotlib names it."""
    dash: str


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", "--", "-.", ":")
NUM_COLORS = 8


@dataclass
class Session:
    """Rows of one kind that one command made on one machine: only these are compared with one another."""

    kind: str
    machine: Machine
    model: str
    device: str
    command: str
    commit: str
    rows: list[Record] = field(default_factory=list)

    @cached_property
    def labels(self) -> list[str]:
        """Subjects, in the order of their first row."""
        return list(dict.fromkeys(row.subject.label for row in self.rows))

    @cached_property
    def cases(self) -> list[str]:
        """Keys of the cases, in the order of their first row."""
        return list(dict.fromkeys(row.case_key for row in self.rows))

    @cached_property
    def case_of(self) -> dict[str, dict[str, Value]]:
        """The case behind each key."""
        return {row.case_key: row.case for row in self.rows}

    @cached_property
    def metrics(self) -> list[str]:
        """Every metric that a row has, in the order of the rows."""
        return list(dict.fromkeys(name for row in self.rows for name in row.metrics))

    @cached_property
    def _values(self) -> dict[tuple[str, str, str], dict[Pair, float]]:
        found: dict[tuple[str, str, str], dict[Pair, float]] = {}
        for row in self.rows:
            for metric, value in row.metrics.items():
                cell = found.setdefault((row.subject.label, row.case_key, metric), {})
                cell[row.provenance.run, row.repeat] = value
        return found

    def values(self, label: str, case: str, metric: str) -> dict[Pair, float]:
        """What each repeat gave; {} where there is none."""
        return self._values.get((label, case, metric), {})

    def samples(self, label: str, case: str, name: str) -> list[float]:
        """Single measurements of all repeats, one after another."""
        rows = (row for row in self.rows if (row.subject.label, row.case_key) == (label, case))
        return [value for row in rows for value in row.samples.get(name, [])]

    def subject(self, label: str) -> Subject:
        """That of the label's first row."""
        return next(row.subject for row in self.rows if row.subject.label == label)

    def subjects(self, label: str) -> list[Subject]:
        """Those of all the label's rows."""
        return [row.subject for row in self.rows if row.subject.label == label]

    def dtypes(self, label: str) -> list[str]:
        """What the label ran in."""
        found = dict.fromkeys(row.conditions.dtype for row in self.rows if row.subject.label == label)
        return [dtype for dtype in found if dtype]

    def case_dtypes(self, case: str) -> set[str]:
        """What a case was run in."""
        return {row.conditions.dtype for row in self.rows if row.case_key == case}

    def varying(self) -> list[str]:
        """Names of what differs between the cases."""
        names = dict.fromkeys(name for case in self.case_of.values() for name in case)
        return [name for name in names if len({str(case.get(name)) for case in self.case_of.values()}) > 1]

    def case_text(self, key: str, without: Iterable[str] = ()) -> str:
        """What sets a case apart from the others: `rose`, `scale 0.4`."""
        case, left = self.case_of[key], [name for name in self.varying() if name not in set(without)]
        return ", ".join(_named(name, case[name]) for name in left if case.get(name) is not None)

    def grouped(self, axis: str) -> dict[str, list[str]]:
        """Cases that differ only in `axis`, in its order, under what sets the group apart."""
        groups: dict[str, list[str]] = {}
        for key in sorted(self.cases, key=lambda key: _order(self.case_of[key].get(axis))):
            if self.case_of[key].get(axis) is not None:
                groups.setdefault(self.case_text(key, without=[axis]), []).append(key)
        return groups

    @property
    def place(self) -> tuple[Machine, str, str]:
        """Machine, model and device: figures of other places do not belong beside these."""
        return self.machine, self.model, self.device

    @property
    def where(self) -> str:
        """Machine and model in a line."""
        return ", ".join(part for part in (self.model, self.machine.name, self.device) if part)


@dataclass
class Rows:
    """All rows of a report."""

    records: list[Record]
    sessions: list[Session]
    styles: dict[str, Style]

    @property
    def lost(self) -> list[Record]:
        """Rows without figures."""
        return [row for row in self.records if row.status != "ok"]

    def of(self, *kinds: str) -> list[Session]:
        """Sessions of these kinds."""
        return [session for session in self.sessions if session.kind in kinds]

    @property
    def labels(self) -> list[str]:
        """Every subject of the figures."""
        return list(self.styles)


def arrange(records: Sequence[Record]) -> Rows:
    """Sort rows into sessions. A label that ran in several dtypes of one case becomes one label for each."""
    records = _told_apart(_last_of_each(records))
    begun = {row.provenance.run: row.provenance.command for row in records}
    done = [row for row in records if row.status == "ok" and row.metrics]
    devices: dict[bytes, set[str]] = {}
    for row in done:
        devices.setdefault(_key(_identity(row, "", begun)), set()).update({row.conditions.device} - {""})
    sessions: dict[bytes, Session] = {}
    for row in done:
        known = devices[_key(_identity(row, "", begun))]
        device = row.conditions.device or (next(iter(known)) if len(known) == 1 else "")  # of a URL it is not known
        identity = _identity(row, device, begun)
        sessions.setdefault(_key(identity), Session(*identity)).rows.append(row)
    kinds = (session for session in sessions.values() if session.kind != "ceiling")
    labels = list(dict.fromkeys(label for session in kinds for label in session.labels))
    return Rows(records, list(sessions.values()), {label: _style(index) for index, label in enumerate(labels)})


_Identity = tuple[str, Machine, str, str, str, str]


def _identity(row: Record, device: str, begun: Mapping[str, str]) -> _Identity:
    """What rows of one session share; those of a run that was resumed have the command of the run that it continues."""
    where = row.provenance
    command = begun.get(where.continues, where.command)
    return row.kind, where.machine, row.conditions.model, device, command, where.commit


def _key(identity: _Identity) -> bytes:
    return msgspec.json.encode(identity)


def _style(index: int) -> Style:
    return Style(index % NUM_COLORS, MARKERS[index % len(MARKERS)], DASHES[index // NUM_COLORS % len(DASHES)])


def _last_of_each(records: Iterable[Record]) -> list[Record]:
    """What was run again within a run, or in one that continues it, counts once; failures of other runs stay."""
    latest: dict[tuple[object, ...], Record] = {}
    for row in records:
        latest[_what(row, row.conditions.dtype), row.provenance.run] = row
    served = {
        _what(row, dtype) for row in latest.values() if row.status == "ok" for dtype in ("", row.conditions.dtype)
    }
    return [row for row in latest.values() if row.status == "ok" or _what(row, row.conditions.dtype) not in served]


def _what(row: Record, dtype: str) -> tuple[object, ...]:
    """The same for attempts at one row."""
    where = row.provenance
    begun = where.continues or where.run
    return begun, where.commit, where.machine.name, row.case_key, row.subject.label, dtype, row.repeat


def _told_apart(records: list[Record]) -> list[Record]:
    seen: dict[tuple[str, str, str], set[str]] = {}
    for row in records:
        if row.conditions.dtype and "dtype" not in row.case:
            key = (row.provenance.command, row.case_key, row.subject.label)
            seen.setdefault(key, set()).add(row.conditions.dtype)
    several = {key for key, dtypes in seen.items() if len(dtypes) > 1}

    def named(row: Record) -> Record:
        if (row.provenance.command, row.case_key, row.subject.label) not in several or not row.conditions.dtype:
            return row
        return replace(row, subject=replace(row.subject, label=f"{row.subject.label} [{row.conditions.dtype}]"))

    return [named(row) for row in records]


def _named(name: str, value: Value) -> str:
    return str(value) if isinstance(value, str) else f"{name.replace('_', ' ')} {value}"


def _order(value: Value) -> tuple[int, float, str]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 1, 0.0, str(value)
    return 0, float(value), ""
