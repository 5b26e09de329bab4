"""How often FlashDecoding++ computes a part again, and what that does to its answers and its time.

The default model answers prompts greedily with decode by `triton:flash_decoding_pp`, once with the unified maximum that
was measured at start and once each with wrong ones: 0, and one so high that every part is computed again, which counts
the parts. Beside them stands Flash-Decoding, which needs no maximum. Steps are launched, not replayed as graphs,
since a graph keeps the maximum that it was recorded with.

    python benchmarks/unified_max.py --model PATH --dtype bfloat16
"""

from __future__ import annotations

import argparse
import time
from itertools import count
from typing import Any

from tessera.attention.backends.triton_decode import TritonFlashDecodingPP
from tessera.attention.contract import Phase
from tessera.config import EngineConfig
from tessera.engine.build import build_engine
from tessera.engine.engine import Engine
from tessera.types import Request, SamplingParams

EVERY_PART = 1e4
"""A maximum that no score comes near."""
NUMBERS = count()


def prompts(engine: Engine, how_many: int, length: int) -> list[list[int]]:
    """Token ids that differ from prompt to prompt."""
    size = engine.info.vocab_size - 10
    return [[(7919 * (row + 1) * (place + 3)) % size for place in range(length)] for row in range(how_many)]


def answer(engine: Engine, asked: list[list[int]], num_tokens: int) -> tuple[list[list[int]], float]:
    """The greedy answers, and the milliseconds of a step."""
    names = [f"{next(NUMBERS)}" for _ in asked]
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens)
    for name, ids in zip(names, asked):
        engine.add(Request(name, ids, params))
    answers: dict[str, list[int]] = {name: [] for name in names}
    started, steps = time.perf_counter(), 0
    while engine.has_work:
        steps += 1
        for output in engine.step():
            answers[output.request_id] += output.token_ids
    return [answers[name] for name in names], 1000 * (time.perf_counter() - started) / steps


def decoding(engine: Engine) -> list[TritonFlashDecodingPP]:
    """The backends that have a unified maximum; a benchmark may look where a user cannot."""
    executor: Any = engine._executor
    bound = [each for of_step in executor._runner._attention.bound(Phase.DECODE) for each in of_step]
    return [each for each in bound if isinstance(each, TritonFlashDecodingPP)]


def build(arguments: argparse.Namespace, decode: str) -> Engine:
    """An engine whose decode steps are attended to by this backend."""
    settings = {"model": arguments.model, "dtype": arguments.dtype, "cuda_graphs": False, "max_model_len": 4096}
    settings |= {"prefill_attention": "triton", "decode_attention": decode, "enable_prefix_caching": False}
    return build_engine(EngineConfig.from_flat(settings))


def same_share(some: list[list[int]], others: list[list[int]]) -> float:
    """The share of tokens before each answer's first difference."""
    equal = sum(next((at for at, (a, b) in enumerate(zip(x, y)) if a != b), len(x)) for x, y in zip(some, others))
    return equal / sum(map(len, others))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()

    plain = build(arguments, "triton:flash_decoding")
    asked = prompts(plain, arguments.prompts, arguments.input_len)
    answer(plain, asked, 4)
    expected, plain_ms = answer(plain, asked, arguments.tokens)
    del plain
    engine = build(arguments, "triton:flash_decoding_pp")
    backends = decoding(engine)
    answer(engine, asked, 4)
    rows = []
    for name, phi in (("measured at start", backends[0].unified_max), ("zero", 0.0), ("every part again", EVERY_PART)):
        for backend in backends:
            backend.unified_max = phi
        before = sum(backend.recomputed() for backend in backends)
        said, step_ms = answer(engine, asked, arguments.tokens)
        again = sum(backend.recomputed() for backend in backends) - before
        rows.append((name, phi, again, same_share(said, expected), step_ms))
    parts = rows[-1][2]
    print("| unified maximum | value | parts computed again | share | tokens as Flash-Decoding's | ms a step |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| none: Flash-Decoding | - | - | - | 1.000 | {plain_ms:.2f} |")
    for name, phi, again, same, step_ms in rows:
        print(f"| {name} | {phi:.2f} | {again:,} of {parts:,} | {again / parts:.4%} | {same:.3f} | {step_ms:.2f} |")


if __name__ == "__main__":
    main()
