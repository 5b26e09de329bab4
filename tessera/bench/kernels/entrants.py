"""Which backends a case of kernels compares: a backend serves one phase here, unless the case has two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tessera.attention.contract import Phase, Shape
from tessera.attention.registry import BackendRow, backend_rows, check_name, class_of, rung_of
from tessera.bench.kernels.cases import KernelCase, Part
from tessera.bench.kernels.ladder import LADDERS
from tessera.bench.kernels.timing import graph_refusal
from tessera.bench.record import Subject
from tessera.bench.subjects import wanted_backends
from tessera.errors import ConfigError


@dataclass(frozen=True)
class Entrant:
    """A backend a phase, to run one case."""

    names: dict[Phase, str]
    reasons: list[str] = field(default_factory=list)
    """Why it cannot run here."""

    @property
    def label(self) -> str:
        """`triton`, or `flash_attn:4+triton`, prefill first, where the phases of a step differ."""
        names = dict.fromkeys(self.names[phase] for phase in sorted(self.names, key=lambda phase: phase == "decode"))
        return "+".join(names)

    @property
    def asked(self) -> dict[str, str]:
        """As a Subject has it."""
        return {str(phase): name for phase, name in self.names.items()}

    @property
    def subject(self) -> Subject:
        """Of a row without figures."""
        return Subject(self.label, asked=self.asked)


class Field:
    """Who runs in which case, as `--backends` says; what it found out about a shape it keeps."""

    def __init__(self, text: str, *, ladder: bool = False) -> None:
        """ConfigError on a name that does not exist, on `auto`, and on one that is given twice.

        ladder  in place of what `text` says, the ladder of each case's phase
        """
        self._ladder = ladder
        self._words = [word.strip() for word in text.split(",")]
        for word in self._words:
            if self._words.count(word) > 1:
                raise ConfigError(f"{word} is to be compared with itself", "name each backend once")
            if word not in _MANY:
                for name in word.split("+", 1):
                    check_name(name, auto=False)
        self._rows: dict[Shape, list[BackendRow]] = {}

    def entrants(self, case: KernelCase, shape: Shape) -> list[Entrant]:
        """Those for one case on a shape of its heads, each with what is against it.

        ConfigError where a pair is named and the case knows neither prefill nor decode, and where a ladder is to be
        climbed in a step of two phases.
        """
        if shape not in self._rows:
            self._rows[shape] = backend_rows([shape])
        found = self._of_step(shape) if len(case.parts) > 1 else self._of_phase(case.parts[0], self._rows[shape])
        return [self._with_graph(each, case) for each in found]

    def _of_phase(self, part: Part, rows: Sequence[BackendRow]) -> list[Entrant]:
        phase = part.phase
        of_phase = {row.name: row.reasons for row in rows if row.phase is phase}
        found: dict[str, Entrant] = {}
        for word in LADDERS[phase] if self._ladder else self._words:
            for name in _names(word, phase, of_phase):
                reasons = [f"{phase}: {why}" for why in of_phase[name]]
                found.setdefault(name, Entrant({phase: name}, reasons))
        return list(found.values())

    def _of_step(self, shape: Shape) -> list[Entrant]:
        """Of a step that decodes and prefills: pairs, as the engine would be told."""
        if self._ladder:
            said = "a ladder has one phase, and a workload has prompts and decoding sequences in one step"
            raise ConfigError(said, "name two workloads, as --workloads 2q2k,32q1s4k, or one of --phases")
        pairs = [pair for word in self._words for pair in wanted_backends(word, [shape]) if pair.prefill != "auto"]
        found = {(pair.prefill, pair.decode): pair.reasons for pair in pairs}
        return [
            Entrant({Phase.DECODE: decode, Phase.PREFILL: prefill}, reasons)
            for (prefill, decode), reasons in found.items()
        ]

    def _with_graph(self, entrant: Entrant, case: KernelCase) -> Entrant:
        """With what is against it as a graph, where only that is asked for."""
        refusals = []
        for part in case.parts:
            backend = class_of(entrant.names[part.phase])
            if not entrant.reasons and backend and (why := graph_refusal(backend, part, case.mode)):
                refusals.append(why)
        return Entrant(entrant.names, entrant.reasons + refusals)


_MANY = ("usable", "all")


def _names(word: str, phase: Phase, of_phase: dict[str, list[str]]) -> Iterator[str]:
    """The backends that a word of --backends stands for in one phase; of `all` those that know it."""
    if word in _MANY:
        known = {name: why for name, why in of_phase.items() if rung_of(name) is None}
        unwanted = f"no {phase} kernel"
        yield from (name for name, why in known.items() if not why or (word == "all" and unwanted not in why))
    elif "+" not in word:
        yield word
    elif phase is Phase.VISION:
        raise ConfigError(
            f"--backends {word} names a backend for prefill and one for decode, none for vision", "name one"
        )
    else:
        yield word.split("+", 1)[phase is Phase.DECODE]
