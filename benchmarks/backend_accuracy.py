"""What each attention backend does to a model's answers: KL divergence per token and equal tokens.

The reference is `naive` in float32 on the same device: it answers every prompt greedily. Every backend
then (1) is led along the reference's tokens, one decode step a token, where its distribution for each next
token is compared with the reference's over the whole vocabulary, and (2) answers freely, where its tokens
are compared place by place.

    python benchmarks/backend_accuracy.py --dtypes bfloat16,float16 --json accuracy.jsonl
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from prompts import prompt_token_ids
from tessera.attention.choose import backend_rows
from tessera.attention.contract import Phase
from tessera.commands.backends import model_shapes
from tessera.config import EngineConfig
from tessera.errors import TesseraError
from tessera.model.registry import load_spec
from tessera.model.source import find_model
from tessera.runner.device import choose_device, choose_dtype
from tessera.runner.executor import Executor
from tessera.text.tokenizer import load_tokenizer
from tessera.types import SamplingParams, Sequence, Step

Ids = list[list[int]]


@dataclass(frozen=True)
class Answer:
    """What an engine answered to every prompt."""

    tokens: Tensor
    """[prompts, tokens] the tokens it was led along, or chose"""
    logits: list[Tensor]
    """One a token, [prompts, vocab] float32"""


class Model:
    """The model with one backend in both phases."""

    def __init__(self, prefill: str, decode: str, dtype: str, options: argparse.Namespace) -> None:
        config = EngineConfig.from_flat(
            {
                "model": options.model,
                "dtype": dtype,
                "device": options.device,
                "prefill_attention": prefill,
                "decode_attention": decode,
                "max_num_seqs": options.prompts,
                "page_size": options.page_size,
                "max_model_len": 1024,
            }
        )
        source = find_model(config.model)
        spec, device = load_spec(source), choose_device(config.device.device)
        self._executor = Executor(config, source, spec, device, choose_dtype(config.model.dtype, spec.dtype, device))
        self._page_size = self._executor.start(max_num_batched_tokens=2048, progress=False).page_size

    def answer(self, prompts: Ids, num_tokens: int, led_by: Tensor | None = None) -> Answer:
        """Greedy tokens, or those of `led_by` [prompts, tokens], with the logits behind each."""
        sequences = list(self._sequences(prompts, num_tokens))
        rows = []
        for sequence in sequences:
            step = Step({sequence: len(sequence.token_ids)})
            rows.append(self._executor.logits(step)[-1])
        logits, chosen = [torch.stack(rows)], []
        for index in range(num_tokens):
            chosen.append(logits[-1].argmax(-1) if led_by is None else led_by[:, index])
            if index + 1 == num_tokens:
                break
            for sequence, token in zip(sequences, chosen[-1].tolist()):
                sequence.num_computed_tokens = len(sequence.token_ids)
                sequence.token_ids.append(token)
            logits.append(self._executor.logits(Step(dict.fromkeys(sequences, 1))))
        return Answer(torch.stack(chosen, 1), logits)

    def _sequences(self, prompts: Ids, num_tokens: int) -> Iterator[Sequence]:
        first_page = 0
        for index, prompt in enumerate(prompts):
            num_pages = -(-(len(prompt) + num_tokens) // self._page_size)
            pages = list(range(first_page, first_page + num_pages))
            first_page += num_pages
            yield Sequence("accuracy", index, list(prompt), len(prompt), SamplingParams(), index, pages)


def compare(led: Answer, free: Answer, reference: Answer) -> dict[str, float]:
    """KL of each token in nats, and shares of equal tokens."""
    divergences = torch.stack([_divergence(*pair) for pair in zip(reference.logits, led.logits)])
    agreed = torch.stack([a.argmax(-1) == b.argmax(-1) for a, b in zip(reference.logits, led.logits)])
    error = max(float((a - b).abs().amax()) for a, b in zip(reference.logits, led.logits))
    equal = free.tokens == reference.tokens
    return {
        "kl_mean": float(divergences.mean()),
        "kl_max": float(divergences.amax()),
        "max_logit_error": error,
        "equal_tokens_led": float(agreed.float().mean()),
        "equal_tokens_free": float(equal.float().mean()),
        "equal_answers": float(equal.all(1).float().mean()),
    }


def _divergence(reference: Tensor, other: Tensor) -> Tensor:
    """[prompts] KL(reference || other), in nats"""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def pairs_of_backends(options: argparse.Namespace, dtype: str) -> list[tuple[str, str, str]]:
    """(label, prefill backend, decode backend): one a usable backend; one phase only has `naive` in the other."""
    config = EngineConfig.from_flat({"model": options.model, "dtype": dtype, "device": options.device})
    _, shapes = model_shapes(config)
    usable: dict[Phase, list[str]] = {Phase.PREFILL: [], Phase.DECODE: []}
    for row in backend_rows(shapes):
        if row.usable and row.phase in usable:
            usable[row.phase].append(row.name)
    names = dict.fromkeys(usable[Phase.PREFILL] + usable[Phase.DECODE])
    prefill, decode = usable[Phase.PREFILL], usable[Phase.DECODE]
    return [
        (name, name if name in prefill else "naive", name if name in decode else "naive")
        for name in names
        if not options.backends or name in options.backends.split(",")
    ]


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One a type and backend, the reference's own first."""
    config = EngineConfig.from_flat({"model": options.model})
    encode = load_tokenizer(find_model(config.model), config.model).encode
    vocab_size = load_spec(find_model(config.model)).vocab_size
    prompts = [ids[:400] for ids in prompt_token_ids(vocab_size, encode, options.prompts)]
    reference = Model("naive", "naive", "float32", options).answer(prompts, options.tokens)
    for dtype in options.dtypes.split(","):
        for label, prefill, decode in pairs_of_backends(options, dtype):
            gc.collect()
            row: dict[str, Any] = {"dtype": dtype, "backend": label, "prefill": prefill, "decode": decode}
            try:
                model = Model(prefill, decode, dtype, options)
                led = model.answer(prompts, options.tokens, reference.tokens)
                free = model.answer(prompts, options.tokens)
                yield row | compare(led, free, reference)
            except (TesseraError, RuntimeError) as error:
                yield row | {"error": str(error).splitlines()[0]}


def main() -> None:
    """Print a Markdown table; with --json also append each row to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--backends", default="", help="only these, comma separated")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--page-size", type=int, default=None)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.prompts} prompts x {options.tokens} tokens, against naive in float32\n")
    print("| dtype | backend | prefill / decode | KL mean | KL max | logit error | equal led | equal free | answers |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows(options):
        head = f"| {row['dtype']} | {row['backend']} | {row['prefill']} / {row['decode']} |"
        if "error" in row:
            print(f"{head} {row['error']} | | | | | |", flush=True)
        else:
            print(
                f"{head} {row['kl_mean']:.2e} | {row['kl_max']:.2e} | {row['max_logit_error']:.3f} | "
                f"{row['equal_tokens_led']:.1%} | {row['equal_tokens_free']:.1%} | {row['equal_answers']:.1%} |",
                flush=True,
            )
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
