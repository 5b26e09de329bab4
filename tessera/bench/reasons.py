"""Rows without figures, gathered: each reason once, with all whom it concerns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tessera.bench.record import Record, Status


@dataclass(frozen=True)
class Lost:
    """Rows that ended alike, for one reason."""

    kind: str
    status: Status
    reason: str
    """Each fact once: see `plain_reason`."""
    rows: list[Record] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """Whom it concerns, in the order of the rows."""
        return list(dict.fromkeys(row.subject.label for row in self.rows))

    @property
    def line(self) -> str:
        """`triton, xformers unavailable: device cpu not in ('cuda',)`."""
        return f"{', '.join(self.labels)} {self.status}: {self.reason}"


def gathered(rows: Iterable[Record]) -> list[Lost]:
    """Rows that are not ok by kind, status and reason, in the order of the first of each."""
    found: dict[tuple[str, str, str], Lost] = {}
    for row in rows:
        if row.status != "ok":
            one = Lost(row.kind, row.status, plain_reason(row))
            found.setdefault((one.kind, one.status, one.reason), one).rows.append(row)
    return list(found.values())


def plain_reason(row: Record) -> str:
    """A row's reason, where it is the same for every phase that was asked for said once and without the phase.

    `prefill: device cpu; decode: device cpu` of a subject that was to prefill and to decode becomes `device cpu`;
    `prefill: device cpu; decode: no decode kernel` stays, for there the phases tell which is which.
    """
    facts = [fact.partition(": ") for fact in row.reason.split("; ")]
    of_phase: dict[str, list[str]] = {}
    for phase, _, fact in facts:
        of_phase.setdefault(phase, []).append(fact)
    if of_phase.keys() != row.subject.asked.keys() or not _all_equal(list(of_phase.values())):
        return row.reason
    return "; ".join(next(iter(of_phase.values())))


def _all_equal(found: Sequence[list[str]]) -> bool:
    return all(each == found[0] for each in found)
