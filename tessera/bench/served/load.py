"""What is sent and what came back: calls, replies, and the load that they are together.

Times are `time.perf_counter()`, in seconds since the load's start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tessera.bench.served.stream import TokenCounts


@dataclass(frozen=True)
class Call:
    """One request to send; ValueError for a body that asks for several texts, whose tokens nobody could tell apart."""

    index: int
    prompt: str | list[int]
    max_tokens: int
    at_s: float = 0.0
    """When an open loop sends it, from the load's start."""
    messages: bool = False
    """To the chat endpoint, as one user message, in place of /v1/completions; the prompt must be a text then."""
    fields: dict[str, Any] = field(default_factory=dict)
    """More of the body: temperature, seed, ignore_eos, ..."""

    def __post_init__(self) -> None:
        if self.fields.get("n", 1) != 1:
            raise ValueError(f"call {self.index} asks for n = {self.fields['n']} texts, only one can be measured")
        if self.messages and not isinstance(self.prompt, str):
            raise ValueError(f"call {self.index} sends token ids as a message; a chat takes text")


@dataclass(frozen=True)
class Reply:
    """What came back for one call."""

    index: int
    due_s: float
    """When it was to be sent: its time in an open loop, in a closed one when its place became free."""
    sent_s: float
    """When its first byte was written to a connection; making one, where none is ready by then, is lag."""
    token_s: list[float]
    """Arrival of each token; tokens of one chunk share its time, and `latency.itl_ms` shares its gap among them."""
    end_s: float
    """Arrival of the stream's end, or the moment of failure."""
    prompt_tokens: int
    output_tokens: int
    finish_reason: str | None
    error: str = ""
    token_counts: TokenCounts = "per chunk"
    """Whether the server told the tokens of each chunk, or those of the whole were spread over its chunks."""
    cached_tokens: int | None = None
    """Of the prompt, found in the server's prefix cache; None where it does not say."""

    @property
    def ok(self) -> bool:
        """Whether it may be counted."""
        return not self.error


@dataclass(frozen=True)
class Load:
    """All replies of one load, in the order of the calls, and what the client itself did meanwhile."""

    replies: list[Reply]
    seconds: float
    """From the load's start to the end of its last reply."""
    client_cpu: float
    """Share of one core that the client used, all threads of a process together; of the busiest of its processes."""
    lag_s: float
    """The most that a call was sent later than it was due."""
    wake_s: list[float] = field(default_factory=list)
    """How late each event loop came to what was due at every WATCH_SECONDS: so late it noted what arrived then."""
    client_cpu_total: float = 0.0
    """As `client_cpu`, of all processes together."""
    num_processes: int = 1
    """The client's."""

    @property
    def failed(self) -> list[Reply]:
        """Replies that are not figures."""
        return [reply for reply in self.replies if not reply.ok]


@dataclass
class Dialect:
    """What a server turned out to understand; shared by all loads on it, so that it need refuse once only."""

    usage_per_chunk: bool = True
