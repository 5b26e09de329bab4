"""Settings that benchmarks share, in the manner of `tessera.config`: a docstring under each field is its help."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import ClassVar

from tessera.bench.places import check_ending
from tessera.config import Ranges
from tessera.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What is compared, how often, and where the rows go."""

    backends: str = "usable"
    """Comma separated: names that `tessera backends` lists, `PREFILL+DECODE` for a pair, auto; `usable` stands for auto
    and all that can serve here, `all` for all there are, the others as rows that say why not. A name given twice is
    compared with itself, as NAME and NAME#2: what is found then is noise."""
    repeats: int = 5
    """Times that each case is run, all subjects in turn."""
    out: str | None = None
    """File that rows are appended to, as JSON lines. Left out: results/ and the benchmark's name."""

    resume: bool = False
    """Leave out what this very command, with this code, has written to --out already."""

    RANGES: ClassVar[Ranges] = {"repeats": (1, 1000)}

    def out_path(self, kind: str) -> Path:
        """The file for the rows of a benchmark of this kind; ConfigError for a name that is no .jsonl file."""
        path = Path(self.out) if self.out is not None else Path("results") / f"{kind}.jsonl"
        check_ending("--out", path, ".jsonl")
        return path


def numbers(flag: str, text: str, kind: type[int] | type[float], low: float, high: float) -> list[float]:
    """The numbers of a comma-separated flag; ConfigError, naming the flag, for one that is none or out of range."""
    found = []
    for word in text.split(","):
        try:
            found.append(kind(word))
        except ValueError:
            raise ConfigError(f"{flag} has {word.strip()!r}, which is not a number", f"use {flag} 1,2,4") from None
        if not low <= found[-1] <= high:
            message = f"{flag} has {word.strip()}, which is not between {low:.10g} and {high:.10g}"
            raise ConfigError(message, f"mend {flag}")
    return found


def require(module: str, extra: str, purpose: str) -> None:
    """Raise ConfigError where `module`, which an extra installs, is missing."""
    try:
        import_module(module)
    except ImportError as error:
        raise ConfigError(f"{purpose} needs {module}: {error}", f"pip install 'tessera-llm[{extra}]'") from None
