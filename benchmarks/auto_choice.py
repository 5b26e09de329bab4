"""Is auto's choice right? Measure as the engine does, then time every backend again, longer, and compare.

For the attention heads of three models: seconds that measuring takes cold and from the cache, and for each
size of step the time of the chosen backend over that of the fastest in the second timing.

    python benchmarks/auto_choice.py --json auto_choice.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tessera.attention.choose import build_attention, load_backend
from tessera.attention.contract import Phase, Shape
from tessera.attention.step import Bucket
from tessera.attention.timing import make_inputs, time_call
from tessera.config import AttentionConfig
from tessera.log import set_up
from tessera.runner.device import capability, choose_device
from tessera.types import AttentionChoice

MODELS = {
    "SmolLM2-135M": (9, 3, 64, 30, 8192),
    "Qwen3-0.6B": (16, 8, 128, 28, 40960),
    "Llama-3-8B": (32, 8, 128, 32, 8192),
}
"""Query heads, key-value heads, head_dim, layers, longest sequence."""


def shape_of(model: str, device: torch.device, dtype: torch.dtype) -> Shape:
    """What the layers of a model ask for."""
    q_heads, kv_heads, head_dim, *_ = MODELS[model]
    return Shape(q_heads, kv_heads, head_dim, head_dim**-0.5, dtype, device.type, capability(device))


def choose_twice(model: str, shape: Shape) -> tuple[int, list[AttentionChoice], float, float]:
    """The page size, the choices, and the seconds for choosing with an empty cache and with a full one."""
    layers, max_len = MODELS[model][3:]
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        _, page_size, choices = build_attention(AttentionConfig(), [shape] * layers, None, max_len)
        seconds.append(time.perf_counter() - started)
    return page_size, choices, seconds[0], seconds[1]


def check(choice: AttentionChoice, shape: Shape, layers: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Each size of step again, every backend that was timed, in turn."""
    phase = Phase(choice.phase)
    bound = {name: load_backend(name)(phase, shape) for bucket in choice.buckets for name in bucket.times_ms}
    for bucket in choice.buckets:
        size = Bucket(bucket.num_seqs, bucket.q_len, bucket.kv_len)
        inputs = make_inputs(phase, shape, size)
        times = {
            name: time_call(bound[name], inputs, repeats=repeats).total(layers)
            for name, milliseconds in bucket.times_ms.items()
            if milliseconds < 3 * min(bucket.times_ms.values())
        }
        best = min(times, key=times.__getitem__)
        yield {
            "phase": str(phase),
            "size": bucket.size,
            "chosen": bucket.backend,
            "best": best,
            "chosen_ms": round(times[bucket.backend], 5),
            "best_ms": round(times[best], 5),
            "ratio": round(times[bucket.backend] / times[best], 3),
            "times_ms": {name: round(value, 5) for name, value in times.items()},
            "choice_times_ms": bucket.times_ms,
        }


def main() -> None:
    """Print a Markdown table; with --json also append each row to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    set_up("debug")  # what each candidate took, on stderr
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tessera-auto-")
    device = choose_device(options.device)
    for model in options.models.split(","):
        shape = shape_of(model, device, getattr(torch, options.dtype))
        page_size, choices, cold, cached = choose_twice(model, shape)
        print(f"\n{model} {MODELS[model][:3]}: measured in {cold:.1f} s, from the cache in {cached:.3f} s\n")
        print("| phase | size | chosen | fastest afterwards | chosen ms | fastest ms | ratio |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for choice in choices:
            for row in check(choice, replace(shape, page_size=page_size), MODELS[model][3], options.repeats):
                print("| {phase} | {size} | {chosen} | {best} | {chosen_ms} | {best_ms} | {ratio} |".format(**row))
                sys.stdout.flush()
                if options.json:
                    with options.json.open("a") as file:
                        seconds = {"cold_seconds": round(cold, 2), "cached_seconds": round(cached, 4)}
                        file.write(json.dumps({"model": model, **seconds, **row}) + "\n")
            for name, reasons in choice.rejected.items():
                print(f"<!-- {choice.phase}: not {name}: {'; '.join(reasons)} -->")


if __name__ == "__main__":
    main()
