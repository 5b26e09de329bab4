"""Greedy token ids equal those of transformers in fp32, however the engine schedules them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from hf_reference import default_model_reference
from prompts import prompt_token_ids
from tessera import LLM, SamplingParams
from tessera.config import ModelConfig
from tessera.model.source import find_model
from tessera.text.tokenizer import load_tokenizer

TIE = 1e-4
"""Two logits closer than this may come out in either order."""


@dataclass(frozen=True)
class Way:
    """One way to schedule the same prompts."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    one_at_a_time: bool = False
    preempts: bool = False


WAYS = (
    Way("one at a time", one_at_a_time=True),
    Way("32 at once", {"max_num_seqs": 32}),
    Way("prefix cache off", {"max_num_seqs": 32, "enable_prefix_caching": False}),
    Way("token budget 64", {"max_num_seqs": 32, "max_num_batched_tokens": 64}),
    Way("little memory", {"max_num_seqs": 32, "max_model_len": 640, "num_pages": 42}, preempts=True),
    Way("naive attention", {"max_num_seqs": 32, "attention": "naive"}),
)


class Reference:
    """transformers on the same weights, one sequence at a time."""

    def __init__(self) -> None:
        self.model = default_model_reference()

    @torch.inference_mode()
    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The greedy continuation."""
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    @torch.inference_mode()
    def gap(self, tokens: list[int], ours: int, theirs: int) -> float:
        """How much more likely than our next token transformers finds its own, in logits."""
        logits = self.model(torch.tensor([tokens])).logits[0, -1]
        return float(logits[theirs] - logits[ours])


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()


def compare(way: Way, reference: Reference, expected: list[list[int]], prompts: list[list[int]], num: int) -> None:
    """Run `prompts` in one way; print how many are equal, fail on any difference that is no tie."""
    llm = LLM(dtype="float32", device="cpu", **way.settings)
    params = SamplingParams(temperature=0, max_tokens=num, ignore_eos=True)
    batches = [[p] for p in prompts] if way.one_at_a_time else [prompts]
    results = [result for batch in batches for result in llm.generate(batch, params, use_tqdm=False)]
    found = [result.outputs[0].token_ids for result in results]
    differing: list[tuple[int, int, int, int, float]] = []
    ties: list[tuple[int, int, int, int, float]] = []
    for number, (prompt, ours, theirs) in enumerate(zip(prompts, found, expected, strict=True)):
        if ours == theirs:
            continue
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
        gap = reference.gap(prompt + theirs[:at], ours[at], theirs[at])
        (ties if abs(gap) < TIE else differing).append((number, at, ours[at], theirs[at], gap))
    status = llm.status
    print(
        f"\n{way.name}: {len(prompts) - len(ties) - len(differing)}/{len(prompts)} equal, ties {ties}, "
        f"{status.preemptions} preemptions, {status.cached_prompt_tokens} cached prompt tokens, {status.steps} steps"
    )
    assert not differing, f"(prompt, position, ours, theirs, logit gap): {differing}"
    assert status.pages_free == status.pages_total
    assert (status.preemptions > 0) == way.preempts


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_short_greedy_outputs_equal_those_of_transformers(way: Way, reference: Reference, short: Any) -> None:
    prompts, expected = short
    settings = {"page_size": 4, "num_pages": 64, "max_model_len": 256} if way.preempts else {}
    compare(Way(way.name, way.settings | settings, way.one_at_a_time, way.preempts), reference, expected, prompts, 12)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_64_greedy_outputs_of_64_tokens_equal_those_of_transformers(way: Way, reference: Reference, full: Any) -> None:
    prompts, expected = full
    compare(way, reference, expected, prompts, 64)


def reference_set(reference: Reference, count: int, num_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    tokenizer = load_tokenizer(find_model(ModelConfig()), ModelConfig())
    prompts = prompt_token_ids(tokenizer.vocab_size, tokenizer.encode, count)
    return prompts, [reference.generate(prompt, num_tokens) for prompt in prompts]


@pytest.fixture(scope="session")
def short(reference: Reference) -> tuple[list[list[int]], list[list[int]]]:
    return reference_set(reference, 12, 12)


@pytest.fixture(scope="session")
def full(reference: Reference) -> tuple[list[list[int]], list[list[int]]]:
    return reference_set(reference, 64, 64)
