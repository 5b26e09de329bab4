"""Work on fixed token ids: the same prompts and the same output lengths for every engine and every run."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from tessera.bench.offline.options import OfflineOptions
from tessera.bench.record import Value
from tessera.errors import ConfigError

MAX_TOKEN_ID = 10_000
"""Ids are drawn below this, as nano-vllm's and mini-sglang's offline benchmarks do."""
MAX_LEN = 2**22


@dataclass(frozen=True)
class Lengths:
    """All the same, or drawn uniformly from low to high, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}..{self.high}"

    def draw(self, source: random.Random, count: int) -> list[int]:
        """`count` lengths; where all are the same nothing is drawn."""
        if self.low == self.high:
            return [self.low] * count
        return [source.randint(self.low, self.high) for _ in range(count)]


@dataclass(frozen=True)
class Workload:
    """So many prompts, so long, with so many tokens to generate from each."""

    name: str
    num_prompts: int
    input_len: Lengths
    output_len: Lengths

    @property
    def case(self) -> dict[str, Value]:
        """As a row names it."""
        return {
            "workload": self.name,
            "num_prompts": self.num_prompts,
            "input_len": str(self.input_len),
            "output_len": str(self.output_len),
        }

    @property
    def max_len(self) -> int:
        """Longest prompt with its output."""
        return self.input_len.high + self.output_len.high

    def draw(self) -> tuple[list[list[int]], list[int]]:
        """(prompts, output lengths), always the same: all input lengths, all output lengths, then all ids."""
        source = random.Random(0)
        input_lens = self.input_len.draw(source, self.num_prompts)
        output_lens = self.output_len.draw(source, self.num_prompts)
        return [[source.randrange(MAX_TOKEN_ID) for _ in range(length)] for length in input_lens], output_lens

    def check_fits(self, model: str, vocab_size: int, context: int, limit: int | None = None) -> None:
        """ConfigError where a model has fewer token ids, or a shorter context, than the work takes.

        `limit` is --max-model-len, where it was given.
        """
        if vocab_size < MAX_TOKEN_ID:
            raise ConfigError(
                f"{model} has {vocab_size} token ids, the workloads draw from {MAX_TOKEN_ID}",
                "give --model one with a larger vocabulary",
            )
        if limit is not None and limit < self.max_len <= context:
            raise ConfigError(
                f"the workload {self.name} needs {self.max_len} tokens a sequence, --max-model-len is {limit}",
                f"use --max-model-len {self.max_len}, or leave it out",
            )
        if self.max_len > context:
            raise ConfigError(
                f"the workload {self.name} needs {self.max_len} tokens a sequence, {model} takes {context}",
                "use --preset quick, or --num-prompts, --input-len and --output-len that fit",
            )


@dataclass(frozen=True)
class Work:
    """A workload as it was drawn."""

    workload: Workload
    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_output(self) -> int:
        """Tokens to generate in all."""
        return sum(self.output_lens)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt with its output."""
        return [len(prompt) + length for prompt, length in zip(self.prompts, self.output_lens)]


def _fixed(name: str, num_prompts: int, input_len: int, output_len: int) -> Workload:
    return Workload(name, num_prompts, Lengths(input_len, input_len), Lengths(output_len, output_len))


PRESETS = {
    workload.name: workload
    for workload in (
        _fixed("quick", 8, 64, 16),
        _fixed("rose", 128, 256, 64),
        Workload("mini", 256, Lengths(100, 1024), Lengths(100, 1024)),
        _fixed("single", 1, 128, 512),
        _fixed("long", 16, 8192, 256),
    )
}


def works_of(options: OfflineOptions) -> list[Work]:
    """The presets, in their order, or the work that the three flags describe, drawn.

    ConfigError for both, for a part of the latter, and for a preset that is not known or named twice.
    """
    own = {
        "--num-prompts": options.num_prompts,
        "--input-len": options.input_len,
        "--output-len": options.output_len,
    }
    given = [flag for flag, value in own.items() if value is not None]
    if not given:
        workloads = _presets(options.preset or "quick")
        return [Work(workload, *workload.draw()) for workload in workloads]
    if options.preset is not None:
        raise ConfigError(f"--preset {options.preset} and {given[0]} exclude each other", "leave one of them out")
    if options.num_prompts is None or options.input_len is None or options.output_len is None:
        missing = [flag for flag, value in own.items() if value is None]
        raise ConfigError(f"{given[0]} is given without {' and '.join(missing)}", "give all three, or a --preset")
    input_len = _lengths("--input-len", options.input_len)
    workload = Workload("own", options.num_prompts, input_len, _lengths("--output-len", options.output_len))
    return [Work(workload, *workload.draw())]


def _presets(text: str) -> list[Workload]:
    names = [word.strip() for word in text.split(",")]
    for name in names:
        if name not in PRESETS or names.count(name) > 1:
            what = "is named twice" if name in PRESETS else "is none that is known"
            raise ConfigError(f"--preset {name!r} {what}", f"use --preset {','.join(PRESETS)}, or some of them")
    return [PRESETS[name] for name in names]


def _lengths(flag: str, text: str) -> Lengths:
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text.strip())
    if found is None:
        raise ConfigError(f"{flag} {text!r} is neither a length nor a range", f"use {flag} 256 or {flag} 100..500")
    low, high = int(found[1]), int(found[2] or found[1])
    if not 1 <= low <= high <= MAX_LEN:
        raise ConfigError(f"{flag} {text} does not go up from 1 to {MAX_LEN} at most", f"use {flag} 100..500")
    return Lengths(low, high)
