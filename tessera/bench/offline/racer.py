"""An entrant of the offline benchmark in the race: its process and facts, or why it can run no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tessera.bench.offline.entrants import Entrant
from tessera.bench.offline.worker_process import WorkerError, WorkerProcess
from tessera.bench.record import Status, Subject


@dataclass
class Racer:
    """An entrant that was started, or whose start failed."""

    entrant: Entrant
    subject: Subject
    process: WorkerProcess | None = None
    failure: str = ""
    """Why it can run no more."""
    status: Status = "failed"
    """Of its rows from then on: `unavailable` where its library turned out to be missing."""
    no_memory: bool = False
    facts: dict[str, Any] | None = None
    """What its worker answered to load."""
    warmup_seconds: dict[str, float] = field(default_factory=dict)
    """What its passes before the clock took, by workload."""

    def fail(self, error: Exception) -> None:
        """It runs no more, because of this."""
        self.failure = str(error) or type(error).__name__
        if isinstance(error, WorkerError):
            self.no_memory = error.no_memory
            self.status = "unavailable" if error.unavailable else "failed"
        self.close()

    def close(self) -> None:
        """End its process."""
        if self.process is not None:
            self.process.close()
            self.process = None


def close_all(racers: Sequence[Racer]) -> None:
    """End all their processes."""
    for racer in racers:
        racer.close()
