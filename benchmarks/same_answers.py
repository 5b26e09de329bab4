r"""Whether answers stay the same: greedy token ids with CUDA graphs and overlap, without them, and of transformers.

    unchanged     mixed requests, some of them aborted, once with CUDA graphs and overlap and once without either; then
                  short prompts with long answers in so few pages that sequences are preempted. An aborted request is
                  aborted at the same token of its own both times, and what it had said until then is compared.
    transformers  this engine and transformers, each in float32 and bfloat16, on one device; prompts are brought to
                  equal lengths in groups, so that transformers runs them as batches without padding.

Where two answers part, transformers in float32, fed what both had said until then, tells how far apart its logits of
the two tokens are. In float32 that has to be less than 1e-3; where bfloat16 has a part in it, less than 6 times the
spacing of bfloat16 numbers near that logit (`BFLOAT16_SPACINGS` says why). Under `unchanged` weights are those that
the engine holds, rounded to its type; under `transformers` they are not rounded. Ends with 1 where a difference
under `unchanged`, or one of both engines in float32, is not explained so. Without a GPU there are no graphs, and
`unchanged` is about overlap alone.

    python benchmarks/same_answers.py --model PATH --json same_answers.jsonl
    python benchmarks/same_answers.py --requests 24 --longest-prompt 80 --longest-answer 24 --scarce-requests 12 \
        --scarce-prompt 8 --scarce-answer 80 --num-pages 8 --prompts 8 --tokens 16
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from same_answers_engine import (
    Answer,
    Asked,
    Run,
    equal_length_prompts,
    fixed_requests,
    free_memory,
    mixed_requests,
    run,
)
from same_answers_reference import Divergence, Reference

from tessera.bench.quality.text import prompt_ids
from tessera.config import ModelConfig
from tessera.model.source import ModelSource, find_model
from tessera.runner.device import choose_device, device_name
from tessera.text.tokenizer import Tokenizer, load_tokenizer

MOST_LINES = 12
"""Divergences of one row that are printed; all of them are written."""
Row = dict[str, Any]


class Comparison:
    """The machine, the model and the options: what every run shares; rows are printed and kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        config = ModelConfig(model=options.model)
        self.source: ModelSource = find_model(config)
        self.tokenizer: Tokenizer = load_tokenizer(self.source, config)
        self.device = choose_device(options.device)
        self.dtypes: list[str] = options.dtypes.split(",")
        self.rows: list[Row] = []

    def settings(self, dtype: str, longest: int, **others: Any) -> dict[str, Any]:
        """Of an engine whose sequences have at most `longest` tokens."""
        options = self.options
        shared = {"model": options.model, "device": self.device.type, "attention": options.attention}
        return {**shared, "dtype": dtype, "max_model_len": longest, "gpu_memory_utilization": 0.5, **others}

    def reference(self, weights: str, compute: str = "float32") -> Reference:
        """The peer on this device."""
        return Reference(self.source, weights, compute, self.device)

    def report(self, row: Row, columns: list[str], found: list[Divergence], names: tuple[str, str]) -> None:
        """Print a row of the table and keep it, with its divergences for after the table."""
        told = _told(found)
        print("| " + " | ".join(str(value) for value in [*(row[name] for name in columns), *told]) + " |")
        sys.stdout.flush()
        row["unexplained"] = sum(not each.explained for each in found)
        row["divergences"] = [asdict(each) | {"explained": each.explained} for each in found]
        row["lines"] = [each.line(names) for each in found]
        self.rows.append(row)

    def failed(self) -> bool:
        """Whether a difference that must be a near tie is none."""
        return any(row["unexplained"] for row in self.rows if row["must"])


def _told(found: list[Divergence]) -> list[str]:
    """Cells that every table ends with: divergent, largest gap, largest share of the bound, not explained."""
    gaps = [(each.gap, each.gap / each.bound) for each in found if each.gap is not None and each.bound]
    largest = f"{max(gap for gap, _ in gaps):.3g}" if gaps else "-"
    share = f"{max(share for _, share in gaps):.0%}" if gaps else "-"
    return [str(len(found)), largest, share, str(sum(not each.explained for each in found))]


TOLD = ["parted", "largest gap", "of its bound", "not explained"]
UNCHANGED = ["dtype", "pages", "requests", "aborted", "ended by EOS", "tokens", "preemptions", "graphs", "equal"]
PAIRS = ["pair", "answers", "tokens", "equal to the first difference", "equal throughout"]


def header(columns: list[str]) -> str:
    """The first two lines of a Markdown table."""
    names = [*columns, *TOLD]
    return "\n| " + " | ".join(names) + " |\n" + "| --- " * len(names) + "|"


def both_ways(comparison: Comparison, dtype: str, asked: list[Asked], num_pages: int | None) -> tuple[Run, Run]:
    """(with CUDA graphs and overlap, without either)"""
    options = comparison.options
    longest = max(len(each.request.prompt_token_ids) + (each.request.params.max_tokens or 0) for each in asked)
    settings = comparison.settings(dtype, longest, num_pages=num_pages)
    with_both = run(settings | {"overlap": True}, asked, options.arriving)
    return with_both, run(settings | {"overlap": False, "cuda_graphs": False}, asked, options.arriving)


def compare_unchanged(comparison: Comparison) -> None:
    """Print the table of `unchanged`."""
    options = comparison.options
    longest, scarce = (options.longest_prompt, options.longest_answer), (options.scarce_prompt, options.scarce_answer)
    asked = mixed_requests(comparison.tokenizer, options.requests, longest, options.seed)
    asked_scarce = mixed_requests(comparison.tokenizer, options.scarce_requests, scarce, options.seed)
    print(header(UNCHANGED))
    for dtype in comparison.dtypes:
        cases = [(asked, None), (asked_scarce, options.num_pages)]
        runs = [both_ways(comparison, dtype, *case) for case in cases]
        reference = comparison.reference(dtype)
        for (some, num_pages), (first, second) in zip(cases, runs, strict=True):
            row = unchanged_row(comparison, reference, dtype, some, first, second)
            row["notes"] = notes(comparison, first, second, scarce=num_pages is not None)
        del reference
        free_memory()


def unchanged_row(
    comparison: Comparison, reference: Reference, dtype: str, asked: list[Asked], first: Run, second: Run
) -> Row:
    """Compare one pair of runs, request by request."""
    pairs = list(zip(first.answers, second.answers, strict=True))
    prompts = [each.request.prompt_token_ids for each in asked]
    found, same = reference.divergences(prompts, pairs, in_float32=dtype == "float32")
    row: Row = {
        "part": "unchanged",
        "must": True,
        "dtype": dtype,
        "pages": f"{first.num_pages} x {first.page_size}",
        "requests": len(asked),
        "aborted": first.count("aborted"),
        "ended by EOS": first.count("stop"),
        "tokens": sum(len(answer.tokens) for answer in first.answers),
        "preemptions": f"{first.preemptions} / {second.preemptions}",
        "graphs": first.graphs,
        "equal": len(pairs) - len(found),
        "tokens before answers part": same,
        "attention": [first.attention, second.attention],
        "steps": [first.steps, second.steps],
        "seconds": [round(first.seconds, 2), round(second.seconds, 2)],
    }
    comparison.report(row, UNCHANGED, found, ("with graphs and overlap", "without"))
    return row


def notes(comparison: Comparison, first: Run, second: Run, *, scarce: bool) -> list[str]:
    """What a pair of runs does not show, though it was to."""
    found = []
    if scarce and not (first.preemptions and second.preemptions):
        found.append("no sequence was preempted: take fewer --num-pages or longer answers, --scarce-answer")
    if comparison.device.type == "cuda" and not first.graphs:
        found.append("no step was replayed as a CUDA graph")
    if first.attention != second.attention:
        found.append(f"not the same attention, {first.attention} and {second.attention}: name one with --attention")
    return found


def compare_transformers(comparison: Comparison) -> None:
    """Print the table of `transformers`."""
    options = comparison.options
    prompts = prompt_ids(comparison.tokenizer.encode, comparison.tokenizer.vocab_size, options.prompts)
    groups = equal_length_prompts(prompts, options.group)
    prompts = [prompt for group in groups for prompt in group]
    asked = fixed_requests(prompts, options.tokens)
    longest = max(map(len, prompts)) + options.tokens
    answers: dict[tuple[str, str], list[Answer]] = {}
    for dtype in comparison.dtypes:
        answers["tessera", dtype] = run(comparison.settings(dtype, longest), asked, len(asked)).answers
    reference = comparison.reference("float32")
    answers["transformers", "float32"] = reference.greedy(groups, options.tokens)
    for dtype in set(comparison.dtypes) - {"float32"}:
        answers["transformers", dtype] = comparison.reference(dtype, dtype).greedy(groups, options.tokens)
    print(header(PAIRS))
    for one, other in _pairs(comparison.dtypes):
        pairs = list(zip(answers[one], answers[other], strict=True))
        exact = {one[1], other[1]} == {"float32"}
        found, same = reference.divergences(prompts, pairs, in_float32=exact)
        names = f"{one[0]} {one[1]}", f"{other[0]} {other[1]}"
        total = len(pairs) * options.tokens
        row: Row = {"part": "transformers", "must": exact, "pair": " / ".join(names), "answers": len(pairs)}
        row |= {"tokens": total, "equal to the first difference": f"{same} ({same / total:.1%})"}
        comparison.report(row | {"equal throughout": len(pairs) - len(found)}, PAIRS, found, names)


def _pairs(dtypes: list[str]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Who is held against whom: everybody against transformers in float32, and each type against its own."""
    exact = ("transformers", "float32")
    pairs = []
    for dtype in dtypes:
        pairs.append((("tessera", dtype), exact))
        if dtype != "float32":
            pairs += [(("transformers", dtype), exact), (("tessera", dtype), ("transformers", dtype))]
    return pairs


PARTS = {"unchanged": compare_unchanged, "transformers": compare_transformers}


def print_divergences(rows: list[Row], names: list[str]) -> None:
    """The first of each row, in words, and what it does not show."""
    for row in rows:
        lines = row.pop("lines")
        told = lines[:MOST_LINES] + [f"- and {len(lines) - MOST_LINES} more"] * (len(lines) > MOST_LINES)
        told += [f"- NOT SHOWN: {note}" for note in row.get("notes", [])]
        if told:
            print(f"\n{', '.join(str(row[name]) for name in names)}:\n")
            print("\n".join(told))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file of a Llama; left out: the default model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--longest-prompt", type=int, default=700)
    parser.add_argument("--longest-answer", type=int, default=120)
    parser.add_argument("--arriving", type=int, default=4, help="new requests a step")
    parser.add_argument("--seed", type=int, default=0, help="of the requests and of what is aborted")
    parser.add_argument("--num-pages", type=int, default=64, help="so few that sequences are preempted")
    parser.add_argument("--scarce-requests", type=int, default=64, help="requests in few pages")
    parser.add_argument("--scarce-prompt", type=int, default=60, help="tokens of their longest prompt")
    parser.add_argument("--scarce-answer", type=int, default=240, help="tokens of their longest answer")
    parser.add_argument("--prompts", type=int, default=32, help="of the part `transformers`")
    parser.add_argument("--tokens", type=int, default=64, help="each, of the part `transformers`")
    parser.add_argument("--group", type=int, default=8, help="prompts that transformers runs at once")
    parser.add_argument("--json", type=Path, help="append each row to this file")
    return parser.parse_args()


def main() -> None:
    """Print a Markdown table for each part, and each difference; with --json also append the rows to a file."""
    options = read_options()
    started = time.perf_counter()
    comparison = Comparison(options)
    machine = f"{device_name(comparison.device)}, torch {torch.__version__}"
    print(f"{machine}, {comparison.source.name}, attention {options.attention}")
    for part in options.parts.split(","):
        before = len(comparison.rows)
        PARTS[part](comparison)
        print_divergences(comparison.rows[before:], {"unchanged": ["dtype", "pages"]}.get(part, ["pair"]))
    if options.json:
        with options.json.open("a") as file:
            file.writelines(json.dumps({"machine": machine, **row}) + "\n" for row in comparison.rows)
    print(f"\n{time.perf_counter() - started:.0f} s; {'FAILED' if comparison.failed() else 'no difference fails'}")
    sys.exit(comparison.failed())


if __name__ == "__main__":
    main()
