"""Run one benchmark after the other, each as a process of its own, and make a report of what they wrote.

A benchmark that fails does not end the others. Ctrl-C ends the one that runs and leaves out the rest; what is there is
reported, and a later run goes on where this one stopped.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tessera.bench.compare.stages import Stage
from tessera.bench.ending import Terminated, sigterm_as_ctrl_c

INTERRUPTED = 130
"""Exit code of what Ctrl-C ended."""
GRACE_SECONDS = 20.0
"""For a benchmark to end its own processes after Ctrl-C, which a terminal sends to it too."""
USUAL_SECONDS = {"kernels": 29, "offline": 78, "online": 60, "api": 17, "ttft": 15, "quality": 31}
"""Of each benchmark relative to the others, for the time that is left."""


@dataclass(frozen=True)
class Outcome:
    """How a benchmark ended."""

    stage: Stage
    code: int
    seconds: float

    @property
    def line(self) -> str:
        """In words."""
        if self.code == INTERRUPTED:
            return f"{self.stage.name}: interrupted after {self.seconds:.0f} s; --resume goes on"
        if self.code == 0:
            return f"{self.stage.name}: {self.seconds:.0f} s"
        return f"{self.stage.name}: ended with exit code {self.code} after {self.seconds:.0f} s"


def run_stages(stages: Sequence[Stage], folder: Path) -> list[Outcome]:
    """Run all, or until Ctrl-C or SIGTERM; their tables go to `folder`/NAME.txt, their progress to stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    began = time.monotonic()
    with sigterm_as_ctrl_c():
        for number, stage in enumerate(stages, 1):
            left = _left([outcome.stage for outcome in outcomes], stages[number - 1 :], time.monotonic() - began)
            sys.stderr.write(f"\n[{number}/{len(stages)}] {stage.name}{left}\n")
            outcomes.append(_run(stage, folder))
            if outcomes[-1].code == INTERRUPTED:
                break
    return outcomes


def make_report(folder: Path, title: str) -> int:
    """report.html, report.md and figures of all rows in a folder; the exit code of `tessera bench report`."""
    words = ["report", str(folder), "--out", str(folder / "report.html"), "--markdown", str(folder / "report.md")]
    return subprocess.run(_command([*words, "--figures", str(folder / "figures"), "--title", title])).returncode


def _run(stage: Stage, folder: Path) -> Outcome:
    began = time.monotonic()
    with (folder / f"{stage.name}.txt").open("wb") as tables:
        process = subprocess.Popen(_command([stage.name, *stage.arguments]), stdout=tables, preexec_fn=_hear_interrupts)
        try:
            code = process.wait()
        except KeyboardInterrupt as reason:
            code = INTERRUPTED
            if isinstance(reason, Terminated):
                process.send_signal(signal.SIGINT)
            _let_end(process)
        finally:
            process.kill()
    return Outcome(stage, code, time.monotonic() - began)


def _hear_interrupts() -> None:
    """In a stage's process before it begins: what a shell runs with & ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _let_end(process: subprocess.Popen[bytes]) -> None:
    """Wait for what was interrupted too; tell it, where only this process was told, and wait once more."""
    for _ in range(2):
        try:
            process.wait(GRACE_SECONDS / 2)
            return
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "tessera.cli", "bench", *words]


def _left(past: Sequence[Stage], coming: Sequence[Stage], seconds: float) -> str:
    """`, about 80 s left`, from how long the past ones took; nothing at the beginning."""
    if not past:
        return ""
    rate = seconds / sum(USUAL_SECONDS[stage.name] for stage in past)
    return f", about {rate * sum(USUAL_SECONDS[stage.name] for stage in coming):.0f} s left for all"
