"""Decode steps on a CPU in bfloat16 with the file's own 4-bit weights and without, in turn: where does each win?

Two engines of the default model, one with `cpu_four_bits`, decode as many sequences of 128 tokens; steps of one and of
the other take turns, so that a drift of the machine's speed meets both. The step of up to how many tokens takes 4-bit
weights (`MOST_TOKENS`) is set aside here.

    python benchmarks/four_bits.py --sequences 1,2,4,8,12
"""

from __future__ import annotations

import argparse
import statistics
import time

from tessera import SamplingParams
from tessera.config import EngineConfig
from tessera.engine.build import build_engine
from tessera.engine.engine import Engine
from tessera.model.layers import linear
from tessera.types import Request

TURNS, STEPS = 10, 8
"""Steps of a turn are timed together."""


def make_engine(*, four_bits: bool) -> Engine:
    """The default model in bfloat16."""
    settings = {"dtype": "bfloat16", "device": "cpu", "attention": "torch_sdpa", "max_model_len": 1024}
    return build_engine(EngineConfig.from_flat(settings | {"cpu_four_bits": four_bits}))


def begin(engine: Engine, num_seqs: int) -> list[str]:
    """Queue as many requests and compute their prompts; returns their ids."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=500)
    for number in range(num_seqs):
        engine.add(Request(str(number), [(7 * place + number) % 4000 + 10 for place in range(128)], params))
    while engine.status().waiting:
        engine.step()
    return [str(number) for number in range(num_seqs)]


def milliseconds(engine: Engine) -> float:
    """Of a step, the mean of a turn."""
    started = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    return (time.perf_counter() - started) / STEPS * 1e3


def main() -> None:
    """Print a line for each number of sequences: medians, and the median, least and greatest ratio of turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", default="1,2,4,8,12", help="comma separated")
    options = parser.parse_args()
    vars(linear)["MOST_TOKENS"] = 2**20
    engines = [make_engine(four_bits=four_bits) for four_bits in (False, True)]
    for num_seqs in map(int, options.sequences.split(",")):
        ids = [begin(engine, num_seqs) for engine in engines]
        turns = [[milliseconds(engine) for engine in engines] for _ in range(TURNS)]
        without, within = (statistics.median(times) for times in zip(*turns))
        ratios = sorted(before / after for before, after in turns)
        spread = f"{statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{num_seqs} sequences: {without:.1f} ms a step, {within:.1f} with 4-bit weights, {spread}", flush=True)
        for engine, queued in zip(engines, ids):
            for request_id in queued:
                engine.abort(request_id)


if __name__ == "__main__":
    main()
