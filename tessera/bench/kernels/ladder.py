"""The ladder: our own kernels, idea by idea, from plain torch to what serves; and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tessera.attention.contract import Phase
from tessera.attention.registry import rung_of
from tessera.bench.kernels.words import Table, by_case, case_title, three
from tessera.bench.record import Record

_PREFILL = ("naive", "triton:two_pass", "triton:fa1", "triton:fa2", "triton")
LADDERS: dict[Phase, tuple[str, ...]] = {
    Phase.PREFILL: _PREFILL,
    Phase.DECODE: ("naive", "triton:paged", "triton:flash_decoding", "triton:flash_decoding_pp", "triton"),
    Phase.VISION: _PREFILL,
}
"""The backends of a phase in the order of their ideas; `naive` is the ground."""
_GROUND = "the ground: products and softmaxes of torch, every score in memory"
_TOP = {
    Phase.PREFILL: "what serves: on a Hopper GPU with warps that only copy",
    Phase.DECODE: "what serves: each sequence cut up as the lengths of the batch say",
    Phase.VISION: "what serves",
}


def idea_of(name: str, phase: Phase) -> str:
    """The idea that a backend adds to the one before it, as a phrase."""
    if name == LADDERS[phase][0]:
        return _GROUND
    return rung_of(name) or _TOP[phase]


@dataclass(frozen=True)
class Step:
    """A rung that was measured."""

    label: str
    ms: float
    before: float | None
    """How many times as fast as the rung before that was measured; None for the first."""
    ground: float | None
    """As the ground; None where that was not measured."""
    idea: str


def climb(rows: Sequence[Record]) -> list[Step]:
    """The rows of one case that a ladder made and that succeeded, in the order of the ideas."""
    on_it = [row for row in rows if row.status == "ok" and "rung" in row.conditions.settings]
    steps: list[Step] = []
    ground = None
    for row in sorted(on_it, key=lambda row: int(row.conditions.settings["rung"] or 0)):
        settings, ms = row.conditions.settings, row.metrics["ms_median"]
        ground = ms if settings["rung"] == 0 else ground
        before = steps[-1].ms / ms if steps else None
        steps.append(Step(row.subject.label, ms, before, ground / ms if ground else None, str(settings["idea"])))
    return steps


def ladder_tables(records: Sequence[Record]) -> list[Table]:
    """A table a case: each rung beneath the one whose better it is."""
    tables = []
    for rows in by_case(row for row in records if row.kind == "kernels").values():
        body: list[tuple[str, ...]] = [("rung", "ms", "x the rung before", "x naive", "idea")]
        for step in climb(rows):
            times = [f"{three(value)}x" if value else "-" for value in (step.before, step.ground)]
            body.append((step.label, three(step.ms), *times, step.idea))
        lines = [f"{row.subject.label} {row.status}: {row.reason}" for row in rows if row.status != "ok"]
        tables.append(Table(f"ladder, {case_title(rows[0].case)}", body if len(body) > 1 else [], lines))
    return tables
