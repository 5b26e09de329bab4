"""What tuning found, on disk, under a key that holds everything it depends on; read whenever `triton` is bound.

A file that is missing, damaged or of another key means the shipped options, never an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from tessera.attention.backends.triton_options import Options
from tessera.attention.contract import Phase, Shape
from tessera.attention.kept import Shelf, code_digest, machine
from tessera.attention.prove import versions_of

_SOURCES = ("attention/tune*.py", "attention/timing.py", "attention/backends/triton*.py", "kernels/*.py")
"""Code of ours that decides what is found, below the package."""


class Part(StrEnum):
    """What of a phase shares its options."""

    ALL = "all batches"
    FEW = "few sequences"
    """DECODE: they alone do not fill the device."""
    MANY = "many sequences"
    """DECODE: they do."""


@dataclass(frozen=True)
class Trial:
    """One candidate: how long it took, or why it is out."""

    options: Options
    times_ms: list[float] = field(default_factory=list)
    """Of one layer, a size each, in the order of `Found.sizes`."""
    problem: str = ""


@dataclass(frozen=True)
class Found:
    """What one search came to."""

    best: Options
    """The table's own unless another was faster by more than noise, twice."""
    sizes: list[str]
    """What was timed, as `8 x 4096`: sequences and tokens each holds."""
    trials: list[Trial]
    """The first is the table's; candidates that time was too short for are left out."""
    untried: int = 0
    """Candidates that time was too short for."""
    seconds: float = 0.0
    """What the search took."""

    @property
    def table(self) -> Trial:
        """The shipped options."""
        return self.trials[0]

    @property
    def winner(self) -> Trial:
        """The best options, as first timed."""
        return next(trial for trial in self.trials if trial.options == self.best)


_SHELF = Shelf(
    "tuned",
    Found,
    "tuning result",
    "is not used: the shipped options are",
    "what was tuned is not kept, every start searches anew",
)


def make_key(phase: Phase, part: Part, shape: Shape) -> dict[str, str]:
    """Everything a search depends on; no time depends on the scale of scores."""
    return machine(shape.device_type) | {
        "code": code_digest(_SOURCES),
        "phase": str(phase),
        "part": str(part),
        "shape": repr(replace(shape, scale=1.0)),
        "versions": str(sorted(versions_of(["triton", "torch"]).items())),
    }


def read(phase: Phase, part: Part, shape: Shape) -> Found | None:
    """What was found for this device and shape; None where nothing was or where it cannot be read."""
    found = _SHELF.read(make_key(phase, part, shape))
    return found if found and any(trial.options == found.best for trial in found.trials) else None


def write(results: Iterable[tuple[Phase, Part, Shape, Found]]) -> None:
    """Keep results; where the folder cannot be written, say so once and go on."""
    _SHELF.write((make_key(phase, part, shape), found) for phase, part, shape, found in results)


def tuned(phase: Phase, shape: Shape) -> dict[str, str]:
    """The options that tuning chose, by part; empty where nothing was tuned."""
    found = {part: read(phase, part, shape) for part in Part}
    return {str(part): result.best.label for part, result in found.items() if result}
