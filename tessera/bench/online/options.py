"""Settings of `tessera bench online`: which trace, how fast, and what counts as good."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tessera.bench.options import numbers
from tessera.config import Ranges
from tessera.errors import ConfigError

if TYPE_CHECKING:
    from tessera.bench.online.trace import Trace


@dataclass(frozen=True, kw_only=True)
class OnlineOptions:
    """What is replayed, and how."""

    trace: str = "poisson"
    """A .jsonl file in Mooncake's format or that of Alibaba's Qwen traces, or poisson: requests made at random."""
    num_requests: int | None = None
    """Requests of the trace, from its first. Left out: all of a file, 32 of poisson."""
    rate: float | None = None
    """Requests a second at scale 1, of poisson only. Left out: 1."""
    input_len: str | None = None
    """Tokens of a prompt, of poisson only: 256, or 100..500 for any between. Left out: 256."""
    output_len: str | None = None
    """Tokens of an answer, of poisson only, as --input-len. Left out: 64."""
    scales: str = "0.4,0.6,0.8,1.0,1.2,1.4,1.6"
    """Comma separated: gaps between arrivals are multiplied by each in turn, so the smallest is the heaviest load."""
    num_warmup: int = 4
    """Requests sent at once to each server before the clock starts, with prompts that share nothing with the others. A
    larger batch than that is run for the first time under the clock."""
    slo_ttft_ms: float = 1000.0
    """A request is good, for goodput, when its first token comes within this time ..."""
    slo_tpot_ms: float = 100.0
    """... and the mean time of its other tokens is no longer than this."""
    request_timeout: float = 600.0
    """Seconds after which a request that has not ended counts as failed."""
    prompt_text: bool = False
    """Send texts of as many words as the trace has tokens, for servers that take no token ids."""
    write_trace: str | None = None
    """File that the trace is written to, in Mooncake's format, before it is replayed."""

    RANGES: ClassVar[Ranges] = {
        "num_requests": (1, 10**7),
        "rate": (1e-3, 1e6),
        "num_warmup": (0, 1000),
        "slo_ttft_ms": (0.01, 1e9),
        "slo_tpot_ms": (0.01, 1e9),
        "request_timeout": (0.01, 86400),
    }

    @property
    def scale_list(self) -> list[float]:
        """The scales; ConfigError where one is no number, out of range, or given twice."""
        found = numbers("--scales", self.scales, float, 0.001, 1000)
        if len(set(found)) < len(found):
            raise ConfigError(f"--scales {self.scales} has a scale twice", "give each once; --repeats repeats them all")
        return found

    @property
    def case(self) -> dict[str, str | float | int]:
        """What tells one made trace from another; {} for a file."""
        if self.trace != "poisson":
            return {}
        return {"rate": self.rate or 1.0, "input_len": self.input_len or "256", "output_len": self.output_len or "64"}

    def make_trace(self, seed: int) -> Trace:
        """The trace, made or read, and written where that was asked; ConfigError for what makes none."""
        from tessera.bench.online.trace import poisson
        from tessera.bench.online.trace_files import read_trace, write_mooncake

        if self.trace == "poisson":
            trace = poisson(
                rate=self.rate or 1.0,
                number=self.num_requests or 32,
                input_len=self.input_len or "256",
                output_len=self.output_len or "64",
                seed=seed,
            )
        else:
            for flag, value in (
                ("--rate", self.rate),
                ("--input-len", self.input_len),
                ("--output-len", self.output_len),
            ):
                if value is not None:
                    raise ConfigError(f"{flag} {value} is for --trace poisson, not for a file", f"leave {flag} out")
            trace = read_trace(Path(self.trace), self.num_requests)
        if self.write_trace is not None:
            write_mooncake(Path(self.write_trace), trace)
        return trace
