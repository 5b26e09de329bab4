"""How long a user waits for the first token: fresh processes, one after another, from their start to one sampled token.

The first process finds caches as they are (compiled kernels, measured attention); those behind it find what it left.
Each prints seconds since its start: imports done, engine ready (weights loaded, attention chosen, tested and proven),
first token. With --profile the last one says which functions took longest.

    python benchmarks/start_up.py --model dummy:qwen3-0.6b --set dtype=bfloat16 load_format=dummy attention=triton
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine_settings import settings_of

PARTS = ("imports", "ready", "first token")


def start(settings: dict[str, Any], prompt: int, started: float, profiler: cProfile.Profile | None) -> dict[str, float]:
    """Build an engine and sample one token; seconds since `started`, of the epoch, at the end of each part."""
    if profiler:
        profiler.enable()
    from tessera import SamplingParams
    from tessera.config import EngineConfig
    from tessera.engine.build import build_engine
    from tessera.types import Request

    found = {PARTS[0]: time.time() - started}
    engine = build_engine(EngineConfig.from_flat(settings))
    found[PARTS[1]] = time.time() - started
    engine.add(Request("0", list(range(10, 10 + prompt)), SamplingParams(temperature=0.0, max_tokens=1)))
    while not engine.step():
        pass
    found[PARTS[2]] = time.time() - started
    if profiler:
        profiler.disable()
    return {name: round(value, 2) for name, value in found.items()}


def child(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """What a fresh process does; its times are its last line."""
    profiler = cProfile.Profile() if options.profile else None
    found = start(settings, options.prompt, options.started, profiler)
    if profiler:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumulative").print_stats(options.lines)
    print(json.dumps(found))


def main() -> None:
    """Print one row a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the engine")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="profile the last process, which slows it down")
    parser.add_argument("--lines", type=int, default=60, help="functions that --profile prints")
    parser.add_argument("--json", type=Path, help="file to append rows to")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = {"model": options.model} | settings_of(parser, options.set)
    if options.started is not None:
        child(options, settings)
        return
    own = [each for each in sys.argv[1:] if each != "--profile"]
    print(f"| process | {' | '.join(PARTS)} |\n| --- |{' --- |' * len(PARTS)}", flush=True)
    for number in range(options.processes):
        last = number == options.processes - 1
        profile = ["--profile"] if options.profile and last else []
        command = [sys.executable, __file__, *own, *profile, "--started", str(time.time())]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"| {number + 1} | {' | '.join(f'{found[name]:.2f} s' for name in PARTS)} |", flush=True)
        if options.json:
            row = {"model": options.model, "set": options.set, "process": number + 1, "seconds": found}
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
