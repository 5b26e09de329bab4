"""Settings of `tessera bench online`: which trace, how fast, and what counts as good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tessera.bench.options import numbers
from tessera.config import Ranges
from tessera.errors import ConfigError

if TYPE_CHECKING:
    from tessera.bench.online.trace import Trace


SCALES = "0.4,0.6,0.8,1.0,1.2,1.4,1.6"
"""Where none are asked for and requests are sent when they are due."""
NUM_REQUESTS = 32
"""Where none are asked for, of a trace that has no number of its own."""


@dataclass(frozen=True, kw_only=True)
class OnlineOptions:
    """What is replayed, and how."""

    trace: str = "poisson"
    """A .jsonl file in Mooncake's format or that of Alibaba's Qwen traces, a .json file of ShareGPT's conversations,
    or poisson: requests made at random."""
    num_requests: int | None = None
    """Requests of the trace: its first, of conversations so many at random. Left out: all of a file with times, 32 of
    others."""
    rate: float | None = None
    """Requests a second at scale 1, of poisson and of conversations, which have no times. Left out: 1."""
    input_len: str | None = None
    """Tokens of a prompt, of poisson only: 256, or 100..500 for any between. Left out: 256."""
    output_len: str | None = None
    """Tokens of an answer, of poisson only, as --input-len. Left out: 64."""
    max_output_len: int | None = None
    """Most tokens of an answer, of conversations only. Left out: as long as the answers there."""
    scales: str | None = None
    """Comma separated: gaps between arrivals are multiplied by each in turn, so the smallest is the heaviest load. Left
    out: 0.4,0.6,0.8,1.0,1.2,1.4,1.6."""
    concurrency: int | None = None
    """Streams at a time: as one request ends the next is sent, whenever it is due in the trace. Several times as many
    --num-requests keep them busy. Left out: each request is sent when it is due."""
    num_warmup: int = 4
    """Requests sent at once to each server before the clock starts, with prompts that share nothing with the others. A
    larger batch than that is run for the first time under the clock."""
    slo_ttft_ms: float = 1000.0
    """A request is good, for goodput, when its first token comes within this time ..."""
    slo_tpot_ms: float = 100.0
    """... and the mean time of its other tokens is no longer than this."""
    request_timeout: float = 600.0
    """Seconds after which a request that has not ended counts as failed."""
    chat: bool = False
    """Send prompts as a user's message to /v1/chat/completions, so as texts. Left out: to /v1/completions."""
    prompt_text: bool = False
    """Send texts of as many words as the trace has tokens, for servers that take no token ids."""
    keep_servers: bool = False
    """Start each server once and keep all of them up to the end, those whose turn it is not idle: much quicker where
    starting takes long. They share the machine's memory, so give each its part by --num-pages or, on a GPU,
    --gpu-memory-utilization. Left out: a server is alone on the machine and started for each repeat."""
    client_processes: int = 0
    """Processes that send the requests together and read the answers. Left out, or 0: by the trace, one for every 32
    requests due within a second, and by the cores, one for every 4; each row says how many."""
    write_trace: str | None = None
    """File that the trace is written to, in Mooncake's format, before it is replayed."""

    RANGES: ClassVar[Ranges] = {
        "num_requests": (1, 10**7),
        "rate": (1e-3, 1e6),
        "concurrency": (1, 4096),
        "max_output_len": (1, 2**24),
        "num_warmup": (0, 1000),
        "slo_ttft_ms": (0.01, 1e9),
        "slo_tpot_ms": (0.01, 1e9),
        "request_timeout": (0.01, 86400),
        "client_processes": (0, 64),
    }

    @property
    def scale_list(self) -> list[float]:
        """The scales, 1 where arrivals play no part; ConfigError for no number, out of range, twice, or for nothing."""
        if self.concurrency is not None:
            self._refuse("--concurrency, where no arrival counts", "scales", "rate")
            return [1.0]
        scales = self.scales if self.scales is not None else SCALES
        found = numbers("--scales", scales, float, 0.001, 1000)
        if len(set(found)) < len(found):
            raise ConfigError(f"--scales {scales} has a scale twice", "give each once; --repeats repeats them all")
        return found

    @property
    def sends_text(self) -> bool:
        """Whether prompts are texts."""
        return self.prompt_text or self.chat

    @property
    def case(self) -> dict[str, str | float | int]:
        """What tells one made trace, or another endpoint for it, from others; {} for a file at the usual endpoint."""
        endpoint: dict[str, str | float | int] = {"endpoint": "chat"} if self.chat else {}
        if self.trace != "poisson":
            return endpoint
        if self.concurrency is None:
            endpoint["rate"] = self.rate or 1.0
        return endpoint | {"input_len": self.input_len or "256", "output_len": self.output_len or "64"}

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the trace is of conversations, whose tokens are still to be counted."""
        from tessera.bench.online.sharegpt import is_sharegpt

        return self.trace != "poisson" and Path(self.trace).is_file() and is_sharegpt(Path(self.trace))

    def make_trace(self, seed: int, encode: Callable[[str], list[int]] | None = None) -> Trace:
        """The trace, made or read, and written where that was asked; ConfigError for what makes none.

        `encode` makes token ids of a text, where `needs_tokenizer`.
        """
        from tessera.bench.online.trace_files import write_mooncake

        trace = self._trace(seed, encode)
        if self.write_trace is not None:
            write_mooncake(Path(self.write_trace), trace)
        return trace

    def _trace(self, seed: int, encode: Callable[[str], list[int]] | None) -> Trace:
        from tessera.bench.online.sharegpt import Limits, read_sharegpt
        from tessera.bench.online.trace import poisson
        from tessera.bench.online.trace_files import read_trace

        if encode is not None and self.needs_tokenizer:
            self._refuse("conversations", "input_len", "output_len")
            limits = Limits(longest_answer=self.max_output_len)
            number, rate = self.num_requests or NUM_REQUESTS, self.rate or 1.0
            return read_sharegpt(Path(self.trace), encode, number=number, rate=rate, seed=seed, limits=limits)
        if self.trace == "poisson":
            self._refuse("--trace poisson", "max_output_len")
            return poisson(
                rate=self.rate or 1.0,
                number=self.num_requests or NUM_REQUESTS,
                input_len=self.input_len or "256",
                output_len=self.output_len or "64",
                seed=seed,
            )
        self._refuse("a file with times", "rate", "input_len", "output_len", "max_output_len")
        return read_trace(Path(self.trace), self.num_requests)

    def _refuse(self, what: str, *names: str) -> None:
        """ConfigError where one of these options, which mean nothing to such a trace, was given."""
        for name in names:
            if (value := getattr(self, name)) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} {value} is not for {what}", f"leave {flag} out")
