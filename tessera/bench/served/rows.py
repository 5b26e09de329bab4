"""What rows of served benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.bench.record import Record
from tessera.types import EngineInfo


def newest(rows: Sequence[Record]) -> list[Record]:
    """Of each repeat of a case by a subject the last row: a repeat that was not complete was measured again for all."""
    last = {(row.case_key, row.subject.label, row.repeat): row for row in rows}
    return [row for row in rows if last[row.case_key, row.subject.label, row.repeat] is row]


def device_type(info: EngineInfo | None) -> str:
    """`cpu` or `cuda`, as conditions have it, of an engine that also names its GPU; '' where nothing is known."""
    return info.device.partition(" ")[0] if info else ""
