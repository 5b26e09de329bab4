"""Workers with faults, run as real processes by peers/serve.py."""

from __future__ import annotations

import sys
from pathlib import Path

from tessera.bench.offline import benchmark as offline
from tessera.bench.offline.entrants import Entrant
from tessera.bench.offline.options import OfflineOptions
from tessera.bench.offline.peers import serve
from tessera.bench.provenance import provenance
from tessera.bench.record import Subject
from tessera.config import EngineConfig

WORKER = """
import os, signal, sys, time

class Worker:
    passes = 0

    def load(self, settings):
        print("a library prints")
        os.system("echo a child prints")
        {load}
        return {{"versions": {{"fake": "1"}}, "settings": {{}}, "note": ""}}

    def run(self, prompts, output_lens, temperature):
        self.passes += 1
        seconds = 0.5
        outputs = [[7] * length for length in output_lens]
        {run}
        return {{"seconds": seconds, "prompt_tokens": sum(map(len, prompts)), "output_ids": outputs,
                 "latencies_s": [seconds] * len(prompts)}}

    def memory(self):
        return {{"host": 1000}}
"""


def fake(folder: Path, name: str, run: str = "pass", load: str = "pass") -> Entrant:
    """An entrant whose worker has these statements in it."""
    path = folder / f"{name}.py"
    path.write_text(WORKER.format(run=run, load=load))
    command = [sys.executable, str(serve.__file__), str(path)]
    return Entrant(Subject(name, engine="hf", note="fake"), command, lambda _: {}, [], lambda subject, _: subject)


def benchmark(entrants: list[Entrant], repeats: int = 3, **options: object) -> offline.OfflineBenchmark:
    """Two prompts of 5 tokens, 3 tokens from each; the default model is named but never loaded."""
    return _made(entrants, repeats, OfflineOptions(num_prompts=2, input_len="5", output_len="3", **options))  # type: ignore[arg-type]


def presets(entrants: list[Entrant], names: str, repeats: int, **options: object) -> offline.OfflineBenchmark:
    """Workloads by name; the default model is named but never loaded."""
    return _made(entrants, repeats, OfflineOptions(preset=names, **options))  # type: ignore[arg-type]


def _made(entrants: list[Entrant], repeats: int, settings: OfflineOptions) -> offline.OfflineBenchmark:
    made = offline.OfflineBenchmark(EngineConfig(), [], settings, repeats, provenance("a test"))
    made._entrants = entrants
    return made
