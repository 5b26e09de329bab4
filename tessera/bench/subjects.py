"""Which backends a benchmark compares: what a user names, what can serve here, and what then ran."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from tessera.attention.contract import Phase, Shape
from tessera.attention.registry import BackendRow, backend_rows, check_name, rung_of
from tessera.bench.record import Subject
from tessera.types import EngineInfo


@dataclass(frozen=True)
class Wanted:
    """A backend for prefill and one for decode, to be compared with others."""

    prefill: str
    decode: str
    reasons: list[str] = field(default_factory=list, compare=False)
    """Why it cannot serve here; such a one is a row without figures."""
    number: int = 1
    """Among those that are the same: a backend named twice is compared with itself."""

    @property
    def label(self) -> str:
        """`triton`, or `flash_attn:4+triton` where the phases differ; `triton#2` for one named a second time."""
        name = self.prefill if self.prefill == self.decode else f"{self.prefill}+{self.decode}"
        return name if self.number == 1 else f"{name}#{self.number}"

    @property
    def settings(self) -> dict[str, str]:
        """As settings of the engine; their names are also those of `tessera serve`'s flags."""
        return {"prefill_attention": self.prefill, "decode_attention": self.decode}

    @property
    def asked(self) -> dict[str, str]:
        """As a Subject has it."""
        return {"prefill": self.prefill, "decode": self.decode}

    @property
    def subject(self) -> Subject:
        """Of a row without figures: nothing ran."""
        return Subject(self.label, asked=self.asked)


def wanted_backends(text: str, shapes: Sequence[Shape]) -> list[Wanted]:
    """What `--backends TEXT` names, in its order, each with the reasons against it on these shapes.

    TEXT is comma separated: `triton` (both phases), `flash_attn:4+triton` (prefill + decode), `auto`; `usable` stands
    for auto and all that can serve here, `all` for all there are, rungs of the ladder left out. A library of which one
    variant only prefills and another only decodes is taken with the first of each that can. One that is named again is
    a subject of its own, with a process of its own: an A/A run, `naive,naive`, shows what a benchmark finds where there
    is nothing to find; its label, `naive#2`, is taken for the name too. ConfigError on a name that does not exist.
    """
    rows = backend_rows(shapes)
    wanted: list[Wanted] = []
    for word in (part.strip() for part in text.split(",")):
        if word in ("usable", "all"):
            wanted += [each for each in _every(rows) if word == "all" or not each.reasons]
        else:
            wanted.append(_named(word, rows))
    return [replace(each, number=1 + wanted[:place].count(each)) for place, each in enumerate(wanted)]


def subject_of(wanted: Wanted, info: EngineInfo) -> Subject:
    """What serves in an engine that was started with `wanted`, with its proofs."""
    proofs = [proof for choice in info.attention for proof in choice.proofs]
    resolved = {choice.phase: choice.backends for choice in info.attention}
    return Subject(wanted.label, asked=wanted.asked, resolved=resolved, proofs=proofs)


def _named(word: str, rows: Sequence[BackendRow]) -> Wanted:
    prefill, _, decode = re.sub(r"#[1-9]\d*$", "", word).partition("+")
    for name in (prefill, decode or prefill):
        if name != "auto":
            check_name(name)
    return _pair(prefill, decode or prefill, rows)


def _pair(prefill: str, decode: str, rows: Iterable[BackendRow]) -> Wanted:
    pairs = {(prefill, Phase.PREFILL), (decode, Phase.DECODE)}
    reasons = [f"{row.phase}: {why}" for row in rows if (row.name, row.phase) in pairs for why in row.reasons]
    return Wanted(prefill, decode, reasons)


def _every(rows: Sequence[BackendRow]) -> list[Wanted]:
    """Auto, every backend that knows both phases, and one pair of each library that divides them; no rungs."""
    rows = [row for row in rows if rung_of(row.name) is None]
    knows = {(row.name, row.phase) for row in rows if f"no {row.phase} kernel" not in row.reasons}
    wanted, divided = [Wanted("auto", "auto")], dict[str, list[str]]()
    for name in dict.fromkeys(row.name for row in rows):
        if {(name, Phase.PREFILL), (name, Phase.DECODE)} <= knows:
            wanted.append(_pair(name, name, rows))
        else:
            divided.setdefault(name.partition(":")[0], []).append(name)
    usable = {(row.name, row.phase) for row in rows if row.usable}

    def first(names: list[str], phase: Phase) -> str | None:
        """The first that can serve here; where none can, the first that knows the phase."""
        known = [name for name in names if (name, phase) in knows]
        return next((name for name in known if (name, phase) in usable), known[0] if known else None)

    for names in divided.values():
        prefill, decode = first(names, Phase.PREFILL), first(names, Phase.DECODE)
        if prefill and decode:
            wanted.append(_pair(prefill, decode, rows))
    return wanted
