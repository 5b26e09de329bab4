"""How long a decode step takes with so many sequences of unlike lengths: what a change of a kernel is worth.

For each number N the lengths are those of a workload of 256 requests, 100 to 1,024 tokens both ways, when N are left.
A step is timed where it is used, between its neighbours, as the engine runs it (on a GPU as a graph, each step prepared
while the one before is computed): chains of one kernel flatter what the next launch of the same kernel can fill.
Versions are compared by running both on one machine, each from its own checkout.

    python benchmarks/decode_steps.py --model dummy:qwen3-0.6b --sequences 239,130,64 --set dtype=bfloat16 \
        load_format=dummy attention=triton gpu_memory_utilization=0.5
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_settings import settings_of

from tessera import SamplingParams
from tessera.config import EngineConfig
from tessera.engine.build import build_engine
from tessera.engine.engine import Engine
from tessera.types import Request

REQUESTS, LEAST, MOST = 256, 100, 1024
"""Of the workload; LEAST to MOST tokens of prompts, and as many asked for."""


def prompt_lengths(count: int) -> list[int]:
    """Tokens that each of `count` sequences holds when so many of the workload's are left."""
    source, decoded = random.Random(count), LEAST + (MOST - LEAST) * (REQUESTS - count) // REQUESTS
    return [source.randint(LEAST, MOST) + max(0, decoded) for _ in range(count)]


def fill(engine: Engine, lengths: list[int], max_tokens: int) -> None:
    """Add sequences that hold so many tokens, and compute these."""
    source = random.Random(0)
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=max_tokens)
    for number, length in enumerate(lengths):
        engine.add(Request(str(number), [source.randrange(1000) for _ in range(length)], params))
    begun: set[str] = set()
    while len(begun) < len(lengths):
        begun |= {output.request_id for output in engine.step()}
    for _ in range(3):  # what is recorded or compiled for steps of decodes
        engine.step()


def time_steps(engine: Engine, num_steps: int, repeats: int) -> list[float]:
    """Microseconds of a step, once a repeat."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(num_steps):
            engine.step()
        found.append(1e6 * (time.perf_counter() - started) / num_steps)
    return found


def measure(engine: Engine, count: int, num_steps: int, repeats: int) -> dict[str, Any]:
    """A row of `count` sequences."""
    lengths = prompt_lengths(count)
    steps_of_prompts = sum(lengths) // max(1, engine.info.max_num_batched_tokens - count) + 2  # others decode beside
    fill(engine, lengths, num_steps * repeats + steps_of_prompts + 8)
    found = time_steps(engine, num_steps, repeats)
    if engine.status().running != count:
        raise SystemExit(f"error: of {count} sequences {engine.status().running} still run\n\nhint: use fewer --steps")
    for number in range(count):
        engine.abort(str(number))
    while engine.has_work:
        engine.step()
    return {"sequences": count, "tokens": sum(lengths), "us": median(found), "least": min(found), "most": max(found)}


def counts(text: str) -> list[int]:
    """`239,130` as numbers of sequences."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers, got {text!r}") from None
    if not all(1 <= count <= REQUESTS for count in found):
        raise argparse.ArgumentTypeError(f"each must be from 1 to {REQUESTS}, got {text}")
    return found


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


def main() -> None:
    """Print a Markdown table; with --json also append each row to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--sequences", type=counts, default="239,130,64", help="comma separated")
    parser.add_argument("--steps", type=positive, default=8, help="timed together")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the engine, as JSON")
    parser.add_argument("--json", type=Path, help="file to append rows to")
    options = parser.parse_args()
    settings = {"enable_prefix_caching": False, **settings_of(parser, options.set)}
    engine = build_engine(EngineConfig.from_flat({"model": options.model, **settings}))
    info = engine.info
    print(f"{info.model} {info.dtype}, {info.device}, torch {torch.__version__} {' '.join(options.set)}\n")
    print("| sequences | tokens held | us a step | least | most |\n| --- | --- | --- | --- | --- |")
    for count in options.sequences:
        row = measure(engine, count, options.steps, options.repeats)
        figures = " | ".join(f"{row[name]:,.0f}" for name in ("tokens", "us", "least", "most"))
        print(f"| {count} | {figures} |", flush=True)
        if options.json:
            about = {"model": info.model, "device": info.device, "torch": torch.__version__, "set": options.set}
            with options.json.open("a") as file:
                file.write(json.dumps(about | row) + "\n")


if __name__ == "__main__":
    main()
