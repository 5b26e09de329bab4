"""LLM on the real default model: same seed, same text, however it is scheduled; bad input costs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tessera import LLM, SamplingParams
from tessera.engine.llm import Prompt
from tessera.errors import CapacityError, ConfigError, RequestError
from tessera.types import RequestOutput

CHAT = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = [
    "The sea is",
    "Once upon a time there was a king who",
    "def add(a, b):",
    "The three largest cities of Europe are",
    "In the year 1969,",
    "Water boils at",
]


def load(**settings: Any) -> LLM:
    return LLM(dtype="float32", device="cpu", **({"max_model_len": 512} | settings))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    engine = load(num_pages=600)
    yield engine
    assert engine.status.pages_free == engine.status.pages_total
    assert (engine.status.running, engine.status.waiting) == (0, 0)


def texts(results: list[RequestOutput]) -> list[str]:
    return [output.text for result in results for output in result.outputs]


def sampled(seed: int) -> SamplingParams:
    return SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_tokens=16)


def test_the_real_model_answers_a_question(llm: LLM) -> None:
    (result,) = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    assert result.outputs[0].text == "The capital of France is Paris."
    assert result.outputs[0].finish_reason == "stop"


def test_same_seed_gives_the_same_text_whatever_else_is_in_the_batch(llm: LLM) -> None:
    alone = [texts(llm.generate(p, sampled(i), use_tqdm=False))[0] for i, p in enumerate(PROMPTS)]
    together = llm.generate(PROMPTS, [sampled(i) for i in range(len(PROMPTS))], use_tqdm=False)
    assert texts(together) == alone
    assert texts(llm.generate(PROMPTS[0], sampled(100), use_tqdm=False)) != alone[:1]


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_prefix_caching": False, "num_pages": 600},
        {"max_num_batched_tokens": 16, "num_pages": 600},
        {"num_pages": 16, "page_size": 4, "max_model_len": 64},
        {"attention": "naive", "num_pages": 600},
        {"prefill_attention": "naive", "decode_attention": "torch_sdpa", "page_size": 32, "num_pages": 300},
    ],
    ids=["no prefix cache", "small budget", "preemption", "naive", "naive prefill, page 32"],
)
def test_same_seed_gives_the_same_text_under_other_settings(llm: LLM, settings: dict[str, Any]) -> None:
    params = [SamplingParams(temperature=0.9, top_k=50, seed=i, max_tokens=24, ignore_eos=True) for i in range(6)]
    expected = texts(llm.generate(PROMPTS, params, use_tqdm=False))
    other = load(**settings)
    assert texts(other.generate(PROMPTS, params, use_tqdm=False)) == expected
    assert (other.status.preemptions > 0) == (settings["num_pages"] == 16)
    assert other.status.pages_free == other.status.pages_total


def test_n_sequences_differ_and_repeat_with_the_seed(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12)
    first, second = (llm.generate(PROMPTS[0], params, use_tqdm=False)[0] for _ in range(2))
    assert len(set(texts([first]))) == 3
    assert texts([first]) == texts([second])
    assert [output.index for output in first.outputs] == [0, 1, 2]


def test_unseeded_requests_differ_but_repeat_from_run_to_run() -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12)
    runs = [texts(load(num_pages=64, seed=seed).generate([PROMPTS[0]] * 2, params)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=32, stop=[" Paris"])
    (result,) = llm.chat(CHAT, params, use_tqdm=False)
    output = result.outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("The capital of France is", "stop", " Paris")


def test_min_tokens_holds_the_end_back_and_ignore_eos_goes_on(llm: LLM) -> None:
    (long,) = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=40, min_tokens=20), use_tqdm=False)
    assert len(long.outputs[0].token_ids) >= 20
    (on,) = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), use_tqdm=False)
    assert len(on.outputs[0].token_ids) == 40
    assert on.outputs[0].finish_reason == "length"


def test_prompt_logprobs_are_the_same_in_one_chunk_in_many_and_after_a_prefix_hit(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2, logprobs=2)
    prompt = list(range(100, 180))
    whole, again = (llm.generate(prompt, params, use_tqdm=False)[0] for _ in range(2))
    chunked = load(num_pages=64, max_num_batched_tokens=16).generate(prompt, params, use_tqdm=False)[0]
    assert whole.prompt_logprobs is not None
    assert len(whole.prompt_logprobs) == 80
    assert whole.prompt_logprobs[0] is None
    for other in (again, chunked):
        assert other.prompt_logprobs is not None
        for mine, theirs in zip(whole.prompt_logprobs[1:], other.prompt_logprobs[1:]):
            assert mine is not None
            assert theirs is not None
            assert mine.keys() == theirs.keys()
            assert all(abs(mine[t].logprob - theirs[t].logprob) < 1e-4 for t in mine)


def test_a_prompt_that_was_seen_is_served_from_the_cache(llm: LLM) -> None:
    prompt = list(range(1000, 1100))
    params = SamplingParams(temperature=0, max_tokens=8)
    first, second = (llm.generate(prompt, params, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 96)
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(llm: LLM) -> None:
    prompts: list[Prompt] = [PROMPTS[0], [5] * 700]
    with pytest.raises(RequestError, match=r"700 tokens, the context holds 512") as caught:
        llm.generate(prompts, use_tqdm=False)
    assert caught.value.param == "prompt"
    assert llm.status.waiting == 0  # the prompt that could be served was taken back too


def test_token_ids_outside_the_vocabulary_are_refused(llm: LLM) -> None:
    for prompt in ([-1], [49152], [5, 10**12]):
        with pytest.raises(RequestError, match="the vocabulary has 0 to 49151"):
            llm.generate(prompt, use_tqdm=False)


def test_threads_that_share_a_model_are_served_one_after_the_other(llm: LLM) -> None:
    expected = [texts(llm.generate(prompt, sampled(7), use_tqdm=False)) for prompt in PROMPTS[:3]]
    with ThreadPoolExecutor(3) as threads:
        results = threads.map(lambda prompt: llm.generate(prompt, sampled(7), use_tqdm=False), PROMPTS[:3])
        assert [texts(result) for result in results] == expected


def test_unknown_settings_and_arguments_raise() -> None:
    with pytest.raises(ConfigError, match="gpu_memory_utilisation") as caught:
        LLM(gpu_memory_utilisation=0.5)
    assert "gpu_memory_utilization" in str(caught.value.hint)
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_a_cache_too_small_for_one_sequence_is_refused_with_a_length_that_fits() -> None:
    with pytest.raises(CapacityError, match=r"num_pages 4 of 16 tokens cannot hold one sequence of 512") as caught:
        load(num_pages=4)
    assert "max_model_len 64" in str(caught.value.hint)


def test_a_context_longer_than_the_model_was_made_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"9000 is more than the 8192"):
        load(max_model_len=9000)
