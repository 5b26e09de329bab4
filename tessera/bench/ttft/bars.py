"""The four bars of first-token latency: what serves each, under which label, and what must be true of its replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tessera.attention.contract import Shape
from tessera.bench.api.load import hits
from tessera.bench.record import Record, Subject
from tessera.bench.served.load import Reply
from tessera.bench.served.servers import Server
from tessera.bench.served.targets import OwnTarget
from tessera.bench.subjects import wanted_backends
from tessera.errors import ConfigError

NO_CACHE = "--no-enable-prefix-caching"
NETWORK = "network"
NETWORK_PATH = "/health"
COLD, WARM = "no prefix cache", "prefix cache warm"
SIMPLE = "naive"
FLASH_DECODING = ("triton",)
"""Backends of ours whose decode kernel is Flash-Decoding: keys split among programs, merged by log-sum-exp."""


@dataclass(frozen=True)
class Bar:
    """One bar: a label, and what a row of it must show."""

    label: str
    is_warm: bool = False
    """Each prompt was sent before."""

    @property
    def is_network(self) -> bool:
        """Nothing is computed."""
        return self.label == NETWORK

    def subject(self, ran: Subject) -> Subject:
        """Of a row of this bar, measured at a server that runs `ran`."""
        if self.is_network:
            return Subject(
                NETWORK, engine="none", note=f"nothing is computed: GET {NETWORK_PATH} of {ran.label}'s server"
            )
        return Subject(self.label, ran.engine, ran.asked, ran.resolved, ran.proofs, ran.note)


@dataclass(frozen=True)
class Stage:
    """A server, and the bars that are measured at it."""

    model: str
    target: OwnTarget
    bars: Sequence[Bar]

    @property
    def label(self) -> str:
        """The server's, as progress names it."""
        return f"{self.model}, {self.target.label}"

    @property
    def about(self) -> str:
        """What is started."""
        return self.target.about

    @property
    def reasons(self) -> Sequence[str]:
        """Why it cannot serve here."""
        return self.target.reasons

    def start(self) -> tuple[Server, Subject]:
        """As the target does."""
        return self.target.start()


@dataclass(frozen=True)
class Model:
    """A model, and the servers that its bars need."""

    name: str
    stages: Sequence[Stage]


def stages_of(model: str, shapes: Sequence[Shape], flags: Sequence[str], fast: str | None) -> list[Stage]:
    """The servers for a model of these shapes, all started with `flags`.

    Left out, `fast` is triton where it can serve both phases, else auto. ConfigError on one that does not exist or
    cannot serve here, on several, and on the simple one.
    """
    if fast is None:
        (triton,) = wanted_backends("triton", shapes)
        fast = "auto" if triton.reasons else "triton"
    found = wanted_backends(fast, shapes)
    if len(found) != 1:
        raise ConfigError(f"--fast {fast} names {len(found)} backends", "name one: --fast triton")
    if found[0].label == SIMPLE:
        raise ConfigError(f"--fast {SIMPLE} is the simple backend of the second bar", "name another, or leave it out")
    if found[0].reasons:
        reasons = "; ".join(found[0].reasons)
        raise ConfigError(
            f"--fast {fast} cannot serve {model} here: {reasons}",
            "see `tessera backends` for those that can, or leave --fast out",
        )
    (simple,) = wanted_backends(SIMPLE, shapes)
    label = found[0].label
    return [
        Stage(model, OwnTarget(simple, [*flags, NO_CACHE]), [Bar(NETWORK), Bar(f"{SIMPLE}, {COLD}")]),
        Stage(model, OwnTarget(found[0], [*flags, NO_CACHE]), [Bar(f"{label}, {COLD}")]),
        Stage(model, OwnTarget(found[0], list(flags)), [Bar(f"{label}, {WARM}", is_warm=True)]),
    ]


def cache_problem(bar: Bar, replies: Sequence[Reply]) -> str:
    """Why these replies are not what the bar says of the prefix cache, or ''."""
    if bar.is_warm:
        missed = len(replies) - hits(replies)
        of = f"{missed} of {len(replies)} prompts, all sent before,"
        return f"{of} did not come out of the prefix cache: a hit is a full page or more" if missed else ""
    found = sum(reply.cached_tokens or 0 for reply in replies)
    return f"{found} prompt tokens came out of a prefix cache that was switched off" if found else ""


def bar_in_words(row: Record) -> str:
    """By what was proven to run; by what was asked only where nothing ran."""
    if row.subject.label == NETWORK:
        return "network only"
    if not row.subject.resolved:
        return row.subject.label
    prefill, decode = (row.subject.resolved.get(phase, []) for phase in ("prefill", "decode"))
    ran = dict.fromkeys([", ".join(prefill), ", ".join(decode)])
    named = " (Flash-Decoding)" if decode and set(decode) <= set(FLASH_DECODING) else ""
    return f"{' + '.join(ran)}{named}, {row.subject.label.rpartition(', ')[2]}"
