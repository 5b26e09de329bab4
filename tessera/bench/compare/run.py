"""Run one benchmark after the other, each as a process of its own, and make a report of what they wrote.

A benchmark that fails or is interrupted does not end the others, and a later run goes on where this one stopped.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tessera.bench.compare.stages import Stage

USUAL_SECONDS = {"kernels": 10, "offline": 40, "online": 60, "api": 60, "ttft": 20, "quality": 30}
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
        if self.code == 0:
            return f"{self.stage.name}: {self.seconds:.0f} s"
        return f"{self.stage.name}: ended with exit code {self.code} after {self.seconds:.0f} s"


def run_stages(stages: Sequence[Stage], folder: Path) -> list[Outcome]:
    """Run all; their tables go to `folder`/NAME.txt, their progress to stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    began = time.monotonic()
    for number, stage in enumerate(stages, 1):
        left = _left([outcome.stage for outcome in outcomes], stages[number - 1 :], time.monotonic() - began)
        sys.stderr.write(f"\n[{number}/{len(stages)}] {stage.name}{left}\n")
        outcomes.append(_run(stage, folder))
    return outcomes


def make_report(folder: Path, title: str) -> int:
    """report.html, report.md and figures of all rows in a folder; the exit code of `tessera bench report`."""
    words = ["report", str(folder), "--out", str(folder / "report.html"), "--markdown", str(folder / "report.md")]
    return subprocess.run(_command([*words, "--figures", str(folder / "figures"), "--title", title])).returncode


def _run(stage: Stage, folder: Path) -> Outcome:
    began = time.monotonic()
    with (folder / f"{stage.name}.txt").open("wb") as tables:
        code = subprocess.run(_command([stage.name, *stage.arguments]), stdout=tables).returncode
    return Outcome(stage, code, time.monotonic() - began)


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "tessera.cli", "bench", *words]


def _left(past: Sequence[Stage], coming: Sequence[Stage], seconds: float) -> str:
    """`, about 80 s left`, from how long the past ones took; nothing at the beginning."""
    if not past:
        return ""
    rate = seconds / sum(USUAL_SECONDS[stage.name] for stage in past)
    return f", about {rate * sum(USUAL_SECONDS[stage.name] for stage in coming):.0f} s left for all"
