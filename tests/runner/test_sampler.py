"""The sampler: each parameter does what it says, and a row's result is its own."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.runner.parameters import SamplingRows, parameters, uniform
from tessera.runner.sampler import Sampler
from tessera.types import SamplingParams, Sequence

EOS = 3
VOCAB_SIZE = 40


def sequence(prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), seed: int = 0, **params: Any) -> Sequence:
    tokens = [*prompt, *output]
    return Sequence("r", 0, tokens, len(prompt), SamplingParams(**params), seed)


def sample(logits: torch.Tensor, *sequences: Sequence) -> list[int]:
    found: list[int] = Sampler([EOS]).sample(logits.clone(), list(sequences)).token_ids.tolist()
    return found


def draws(logits: torch.Tensor, count: int, **params: Any) -> torch.Tensor:
    """How often each token comes out over `count` seeds."""
    rows = [sequence(seed=seed, **params) for seed in range(count)]
    return torch.bincount(torch.tensor(sample(logits.expand(count, -1), *rows)), minlength=logits.shape[-1])


def random_logits(rows: int = 1, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = random_logits(5)
    assert sample(logits, *[sequence(temperature=0)] * 5) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    logits, count = random_logits(), 20_000
    expected = (logits[0] / temperature).softmax(-1) * count
    found = draws(logits, count, temperature=temperature)
    chi2 = ((found - expected) ** 2 / expected).sum().item()
    assert chi2 < 90  # 39 degrees of freedom: beyond 90 by chance once in 100,000


def test_top_k_keeps_exactly_the_k_most_likely() -> None:
    logits = random_logits()
    found = draws(logits, 5000, top_k=5, temperature=3.0)
    assert set(found.nonzero()[:, 0].tolist()) == set(logits[0].topk(5).indices.tolist())


@pytest.mark.parametrize("vocab_size", [40, 5000])
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(vocab_size: int) -> None:
    """5000 near-equal tokens take the path past the shortlist."""
    logits = random_logits(vocab_size=vocab_size) * (1 if vocab_size == 40 else 0.01)
    probs, order = logits[0].softmax(-1).sort(descending=True)
    kept = int((probs.cumsum(0) - probs < 0.6).sum())
    found = draws(logits, 3000, top_p=0.6)
    assert set(found.nonzero()[:, 0].tolist()) <= set(order[:kept].tolist())
    assert vocab_size > 40 or found[order[kept - 1]] > 0


def test_min_p_drops_tokens_below_the_share_of_the_best() -> None:
    logits = random_logits()
    probs = logits[0].softmax(-1)
    found = draws(logits, 5000, min_p=0.2, temperature=1.0)
    assert set(found.nonzero()[:, 0].tolist()) == set((probs >= 0.2 * probs.max()).nonzero()[:, 0].tolist())


def one_uniform(seed: int, position: int) -> float:
    """SplitMix64 twice, in numbers without an end."""

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
        return value ^ (value >> 31)

    return float((mix((mix(seed) + position * 0x9E3779B97F4A7C15) % 2**64) >> 32) * 2.0**-32)


def uniforms(pairs: list[tuple[int, int]]) -> list[float]:
    seeds, positions = np.array(pairs, np.uint64).reshape(-1, 2).T
    found: list[float] = uniform(seeds, positions).tolist()
    return found


@given(pairs=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 10_000))))
def test_uniform_is_splitmix_twice_and_within_zero_and_one(pairs: list[tuple[int, int]]) -> None:
    found = uniforms(pairs)
    assert found == [one_uniform(*pair) for pair in pairs]
    assert all(0 <= each < 1 for each in found)


def test_uniform_is_even_over_seeds_and_over_positions() -> None:
    for numbers in (uniforms([(s, 0) for s in range(10_000)]), uniforms([(7, p) for p in range(10_000)])):
        counts = torch.histc(torch.tensor(numbers), 20, 0, 1)
        assert ((counts - 500) ** 2 / 500).sum() < 50  # 19 degrees of freedom


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_row_samples_the_same_token_whatever_else_is_in_the_batch(data: st.DataObject) -> None:
    def params() -> Sequence:
        return sequence(
            seed=data.draw(st.integers(0, 1000)),
            temperature=data.draw(st.sampled_from([0.0, 0.7, 1.5])),
            top_k=data.draw(st.sampled_from([0, 3])),
            top_p=data.draw(st.sampled_from([1.0, 0.5])),
            min_p=data.draw(st.sampled_from([0.0, 0.1])),
            presence_penalty=data.draw(st.sampled_from([0.0, 1.0])),
            repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
            output=(5, 5, 6),
        )

    rows = [params() for _ in range(data.draw(st.integers(1, 6)))]
    logits = random_logits(len(rows), seed=data.draw(st.integers(0, 100)))
    alone = [sample(logits[i : i + 1], row)[0] for i, row in enumerate(rows)]
    assert sample(logits, *rows) == alone


@pytest.mark.parametrize("extreme", [{"temperature": 1.1e-5}, {"top_p": 1e-40}, {"temperature": 100.0}])
def test_extreme_parameters_sample_a_token_and_no_nan(extreme: dict[str, Any]) -> None:
    logits = random_logits() * 50
    for seed in range(20):
        (token,) = sample(logits, sequence(seed=seed, **extreme))
        assert 0 <= token < VOCAB_SIZE
        assert ("temperature" in extreme and extreme["temperature"] > 1) or token == int(logits.argmax())


def test_temperatures_too_small_to_divide_by_are_greedy() -> None:
    logits = random_logits()
    assert sample(logits, sequence(temperature=1e-39)) == [int(logits.argmax())]


def test_nan_logits_give_a_token_of_the_vocabulary() -> None:
    (token,) = sample(torch.full((1, VOCAB_SIZE), torch.nan), sequence())
    assert 0 <= token < VOCAB_SIZE


def test_penalties_change_the_logits_as_documented() -> None:
    logits = torch.zeros(1, 6)
    logits[0, :4] = torch.tensor([5.0, 4.9, 4.8, -1.0])
    seen: dict[str, Any] = {"prompt": (0,), "output": (1, 1), "temperature": 0}
    assert sample(logits, sequence(**seen)) == [0]
    assert sample(logits, sequence(**seen, repetition_penalty=1.2)) == [2]  # prompt and output both count
    assert sample(logits, sequence(**seen, presence_penalty=0.5)) == [0]  # the prompt does not
    logits[0, 1] = 5.5
    assert sample(logits, sequence(**seen, presence_penalty=0.4)) == [1]  # once: 5.1
    assert sample(logits, sequence(**seen, frequency_penalty=0.4)) == [0]  # twice: 4.7


def test_logit_bias_forces_and_forbids() -> None:
    logits = random_logits()
    best = int(logits.argmax())
    assert sample(logits, sequence(temperature=0, logit_bias={7: 100.0})) == [7]
    assert sample(logits, sequence(temperature=0, logit_bias={best: -100.0})) != [best]


def test_end_tokens_wait_for_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, EOS], logits[0, 9] = 10.0, 5.0
    assert sample(logits, sequence(temperature=0)) == [EOS]
    assert sample(logits, sequence(temperature=0, min_tokens=1)) == [9]
    assert sample(logits, sequence(temperature=0, min_tokens=1, output=(4,))) == [EOS]
    assert sample(logits, sequence(temperature=0, min_tokens=1, stop_token_ids=[9])) not in ([EOS], [9])
    assert sample(logits, sequence(temperature=0, min_tokens=1, ignore_eos=True)) == [EOS]


def test_rows_that_ask_for_no_change_are_not_looked_at_one_by_one() -> None:
    def num_selects(*sequences: Sequence) -> int:
        with torch.profiler.profile() as profiler:
            sample(random_logits(4), *sequences)
        return sum(event.name == "aten::select" for event in profiler.events())

    plain, asking = sequence(temperature=0), sequence(temperature=0, logit_bias={5: 1.0})
    assert (num_selects(*[plain] * 4), num_selects(plain, plain, plain, asking)) == (0, 1)


def test_logprobs_are_the_models_own_and_agree_with_themselves() -> None:
    logits = random_logits(2)
    asked = sequence(temperature=0.5, logprobs=4, presence_penalty=2.0, output=(int(logits[0].argmax()),))
    other = sequence()
    chosen, found = Sampler([EOS]).sample(logits.clone(), [asked, other]).result()
    assert (list(found), len(chosen)) == ([asked], 2)
    token_ids = chosen[:1]
    entry, exact = found[asked], logits[0].log_softmax(-1)
    assert entry.token_id == token_ids[0]
    assert math.isclose(entry.logprob, exact[token_ids[0]].item(), abs_tol=1e-6)
    assert entry.rank == int((exact > exact[token_ids[0]]).sum()) + 1
    assert [t for t, _ in entry.top] == exact.topk(4).indices.tolist()
    assert dict(entry.top).get(entry.token_id, entry.logprob) == entry.logprob


def test_the_kernel_is_told_each_rows_own_parameters_and_random_number() -> None:
    rows = [
        sequence(seed=5, temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, output=(4, 4)),
        sequence(temperature=1e-6, top_k=-1),
    ]
    table = parameters(rows)
    assert table.dtype == np.float64
    assert table.tolist() == [[0.7, 9, 0.8, 0.1, one_uniform(5, 2)], [0] * 5]  # greedy: no more is asked


def test_rows_that_are_kept_say_what_rows_made_anew_say_whoever_comes_and_goes() -> None:
    random, kept, alive = Random(0), SamplingRows.of([]), list[Sequence]()
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_p": 0.5}, {"min_tokens": 3}, {"min_p": 0.1, "top_k": 4}]
    for _ in range(200):
        alive = [each for each in alive if random.random() < 0.8]
        alive += [
            sequence(seed=random.randrange(2**64), output=(1,) * random.randrange(5), **random.choice(kinds))
            for _ in range(random.randrange(4))
        ]
        random.shuffle(alive)
        for each in alive:
            each.token_ids.append(1)
        kept = kept.following(list(alive))
        num_tokens = np.array([each.num_tokens for each in alive], np.int64)
        assert kept.parameters(num_tokens).tolist() == parameters(alive).tolist()
        assert kept.all_plain(num_tokens) == all(each.num_output_tokens >= each.params.min_tokens for each in alive)


@pytest.mark.parametrize("asked", [{"logprobs": 0}, {"presence_penalty": 1.0}, {"logit_bias": {3: 1.0}}])
def test_a_row_that_asks_more_than_its_token_is_never_plain(asked: dict[str, Any]) -> None:
    rows = SamplingRows.of([sequence(temperature=0.0), sequence(temperature=0.0, **asked)])
    assert not rows.all_plain(np.array([10_000, 10_000]))
    assert rows.following(rows.sequences[:1]).all_plain(np.array([10_000]))


def test_whether_the_kernel_serves_is_decided_once_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert not Sampler([EOS]).fused
    assert not Sampler([EOS], torch.device("cpu")).fused
    monkeypatch.setattr("tessera.runner.sampler.fused_on", lambda device: device.type == "cuda")
    assert Sampler([EOS], torch.device("cuda")).fused
    assert not Sampler([EOS], torch.device("cuda"), fused=False).fused


def test_random_numbers_that_are_kept_are_those_made_anew_however_rows_go_on() -> None:
    """By one each, by many, back, and each by another number; the same list of sequences all the time."""
    rows = [Sequence("r", i, [1] * (5 + i), 5 + i, SamplingParams(temperature=float(i > 0)), i) for i in range(4)]
    kept, num_tokens, random = SamplingRows.of(rows), np.array([5, 6, 7, 8]), Random(0)
    for _ in range(300):
        together = random.choice((1, 1, 1, 1, 1, 40, -3))
        apart = [random.randrange(3) if random.random() < 0.1 else 0 for _ in rows]
        num_tokens = np.maximum(num_tokens + together + apart, [5, 6, 7, 8])
        assert kept.parameters(num_tokens).tolist() == SamplingRows.of(rows).parameters(num_tokens).tolist()
