"""tessera against transformers `generate` on this machine: the same weights, the same token ids, greedy.

In bfloat16 tessera multiplies steps of few tokens by the file's 4-bit weights, of which transformers' are made;
--no-cpu-four-bits has both multiply by those made of them.

Every cell is measured in turn, tessera then transformers, `--repeats` times, so that a drift of the
machine's speed meets both; the table shows medians and the ratio of each pair.

    prefill  N prompts of `--prompt` tokens, one token out: prompt tokens a second
    decode   N prompts of 128 tokens, 48 tokens out: output tokens a second after the first token
    mixed    3 N requests, prompts of 16..256 and outputs of 8..128 tokens; transformers runs them in batches of N,
             padded, until the longest of a batch is done; output tokens asked for a second
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from hf_reference import default_model_reference
from tessera import LLM, SamplingParams

Ids = list[list[int]]
EOS = 2


def random_prompts(lengths: list[int], seed: int) -> Ids:
    """Prompts of random token ids, no two alike."""
    source = random.Random(seed)
    return [[source.randrange(100, 40_000) for _ in range(length)] for length in lengths]


class Tessera:
    """The engine under test."""

    name = "tessera"

    def __init__(self, dtype: str, num_seqs: int, *, four_bits: bool) -> None:
        settings: dict[str, Any] = {"max_num_seqs": num_seqs, "enable_prefix_caching": False}
        self.llm = LLM(dtype=dtype, device="cpu", cpu_four_bits=None if four_bits else False, **settings)

    def run(self, prompts: Ids, outputs: list[int]) -> float:
        """Seconds for all requests."""
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in outputs]
        started = time.perf_counter()
        self.llm.generate(list(prompts), params, use_tqdm=False)
        return time.perf_counter() - started


class Transformers:
    """The peer: `model.generate` on left-padded batches."""

    name = "transformers"

    def __init__(self, dtype: str, num_seqs: int) -> None:
        self.model = default_model_reference(getattr(torch, dtype))
        self.num_seqs = num_seqs

    @torch.inference_mode()
    def run(self, prompts: Ids, outputs: list[int]) -> float:
        """Seconds for all requests, in batches of `num_seqs` in the given order."""
        started = time.perf_counter()
        for first in range(0, len(prompts), self.num_seqs):
            batch = prompts[first : first + self.num_seqs]
            num_tokens = max(outputs[first : first + self.num_seqs])
            width = max(map(len, batch))
            ids = torch.tensor([[EOS] * (width - len(p)) + p for p in batch])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
            self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                eos_token_id=None,
                pad_token_id=EOS,
            )
        return time.perf_counter() - started


def measure_prefill(engine: Tessera | Transformers, num_seqs: int, prompt: int, seed: int) -> float:
    """Prompt tokens a second."""
    return num_seqs * prompt / engine.run(random_prompts([prompt] * num_seqs, seed), [1] * num_seqs)


def measure_decode(engine: Tessera | Transformers, num_seqs: int, _prompt: int, seed: int) -> float:
    """Output tokens a second after the first token of each."""
    prompts, num_tokens = random_prompts([128] * num_seqs, seed), 48
    first = engine.run(prompts, [1] * num_seqs)
    whole = engine.run(prompts, [num_tokens] * num_seqs)
    return num_seqs * (num_tokens - 1) / (whole - first)


def measure_mixed(engine: Tessera | Transformers, num_seqs: int, _prompt: int, seed: int) -> float:
    """Asked-for output tokens a second over requests of mixed lengths."""
    source = random.Random(seed)
    lengths = [source.randint(16, 256) for _ in range(3 * num_seqs)]
    outputs = [source.randint(8, 128) for _ in lengths]
    return sum(outputs) / engine.run(random_prompts(lengths, seed), outputs)


WORKLOADS: dict[str, Callable[[Tessera | Transformers, int, int, int], float]] = {
    "prefill": measure_prefill,
    "decode": measure_decode,
    "mixed": measure_mixed,
}


def measure(
    dtype: str, num_seqs: int, workload: str, engines: list[Tessera | Transformers], options: argparse.Namespace
) -> dict[str, Any]:
    """One row: medians of both and the ratio pair by pair."""
    speeds: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for repeat in range(options.repeats):
        for engine in engines:
            speeds[engine.name].append(WORKLOADS[workload](engine, num_seqs, options.prompt, repeat))
    ours, theirs = speeds["tessera"], speeds["transformers"]
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    row = {
        "dtype": dtype,
        "sequences": num_seqs,
        "workload": workload,
        "tessera": round(statistics.median(ours), 1),
        "transformers": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
    }
    print("| {dtype} | {sequences} | {workload} | {tessera} | {transformers} | {ratio} | {ratios} |".format(**row))
    sys.stdout.flush()
    return row


def main() -> None:
    """Print a Markdown table; with --out also write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--sequences", default="1,8,32")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--prompt", type=int, default=256, help="tokens a prompt of the prefill workload")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-four-bits", action=argparse.BooleanOptionalAction, default=True, help="see above")
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n")
    print("| dtype | sequences | workload | tessera tok/s | transformers tok/s | ratio | ratios |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for dtype in options.dtypes.split(","):
        for num_seqs in map(int, options.sequences.split(",")):
            ours = Tessera(dtype, num_seqs, four_bits=options.cpu_four_bits)
            engines: list[Tessera | Transformers] = [ours, Transformers(dtype, num_seqs)]
            for engine in engines:
                engine.run(random_prompts([32] * num_seqs, 99), [4] * num_seqs)  # warm up
            rows += [measure(dtype, num_seqs, name, engines, options) for name in options.workloads.split(",")]
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
