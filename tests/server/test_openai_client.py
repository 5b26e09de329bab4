"""The `openai` package, unmodified, against the default model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from server_process import ServerProcess, wait_for

PARIS: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_a_chat_is_answered_with_text_reason_and_usage(client: openai.OpenAI, model: str) -> None:
    chat = client.chat.completions.create(model=model, messages=PARIS, temperature=0, max_tokens=40)
    assert chat.object == "chat.completion" and chat.model == model
    choice = chat.choices[0]
    assert choice.message.role == "assistant" and "Paris" in (choice.message.content or "")
    assert choice.finish_reason == "stop"
    assert chat.usage and chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    assert chat.usage.prompt_tokens_details is not None


def test_a_stream_adds_up_to_the_answer_without_streaming(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": PARIS, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [choice.delta.role for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == [] and chunks[-1].usage and whole.usage
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_seeded_choices_differ_from_one_another_and_repeat(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "prompt": "Once upon a time", "n": 3, "seed": 7, "max_tokens": 8}
    first, second = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in second.choices]
    assert first.usage and first.usage.completion_tokens == 24


def test_prompts_may_be_texts_or_token_ids_and_keep_their_order(
    client: openai.OpenAI, model: str, server: ServerProcess
) -> None:
    texts = ["The capital of France is", "One two three four"]
    ids = [server.post("/tokenize", {"prompt": text}).json()["tokens"] for text in texts]
    by_text = client.completions.create(model=model, prompt=texts, temperature=0, max_tokens=4)
    by_ids = client.completions.create(model=model, prompt=ids, temperature=0, max_tokens=4)
    alone = [client.completions.create(model=model, prompt=p, temperature=0, max_tokens=4) for p in (texts[0], ids[1])]
    answers = [choice.text for choice in by_text.choices]
    assert "Paris" in answers[0] and [choice.text for choice in by_ids.choices] == answers
    assert [completion.choices[0].text for completion in alone] == answers


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 30}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[7:10]
    cut = client.completions.create(**asked, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    streamed = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.text


def test_the_smaller_of_both_token_limits_counts(client: openai.OpenAI, model: str) -> None:
    for limits in ({"max_tokens": 3, "max_completion_tokens": 9}, {"max_tokens": 9, "max_completion_tokens": 3}):
        chat = client.chat.completions.create(model=model, messages=PARIS, temperature=0, **limits)  # type: ignore[call-overload]
        assert chat.usage.completion_tokens == 3 and chat.choices[0].finish_reason == "length"


def test_a_completion_has_sixteen_tokens_unless_it_says_otherwise(client: openai.OpenAI, model: str) -> None:
    completion = client.completions.create(
        model=model, prompt="a b c d", temperature=0, extra_body={"ignore_eos": True}
    )
    assert completion.usage and completion.usage.completion_tokens == 16
    assert completion.choices[0].finish_reason == "length"


def test_vllm_extras_and_harmless_metadata_are_taken(client: openai.OpenAI, model: str) -> None:
    extras = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "skip_special_tokens": False}
    chat = client.chat.completions.create(
        model=model,
        messages=PARIS,
        max_tokens=2,
        user="somebody",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        extra_body=extras | {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}},
    )
    assert chat.usage and chat.usage.completion_tokens == 2


def test_errors_become_the_clients_own_types(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        client.chat.completions.create(model=model, messages=PARIS, temperature=-1)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=PARIS)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    assert client.models.retrieve(model).id == model


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r"3000 tokens.* 2048 "):
        client.completions.create(model=model, prompt=[5] * 3000)
    with pytest.raises(openai.BadRequestError, match=r" 2048 ") as long_chat:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "word " * 5000}])
    assert long_chat.value.param == "messages"


def test_more_sequences_than_the_queue_holds_are_told_to_come_back(
    client: openai.OpenAI, model: str, server: ServerProcess
) -> None:
    with pytest.raises(openai.BadRequestError, match=r"65 sequences .* 64 "):
        client.completions.create(model=model, prompt=["a"] * 13, n=5, max_tokens=1)
    asked: dict[str, Any] = {
        "model": model,
        "prompt": "a",
        "n": 40,
        "max_tokens": 30,
        "extra_body": {"ignore_eos": True},
    }
    with client.completions.create(**asked, stream=True):
        wait_for(lambda: server.status()["running"] > 0)
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(**asked)
    assert full.value.response.headers["retry-after"] == "1"
    server.wait_until_idle()
