"""Logprobs in both of OpenAI's shapes, as lm-eval and others read them."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from server_process import ServerProcess, check_error
from tessera.server.logprobs import CompletionLogprobsWriter, chat_logprobs, prompt_logprobs
from tessera.types import TokenLogprobs


def _ids(server: ServerProcess, text: str) -> list[int]:
    tokens: list[int] = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    return tokens


def test_loglikelihood_as_lm_eval_asks_for_it(server: ServerProcess) -> None:
    """Two contexts with continuations at once; a greedy continuation is told apart from another."""
    context = _ids(server, "The capital of France is")
    good, bad = context + _ids(server, " Paris"), context + _ids(server, " Lima")
    asked = {"prompt": [good, bad], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    choices = server.post("/v1/completions", asked).json()["choices"]
    found = []
    for prompt, choice in zip((good, bad), sorted(choices, key=lambda choice: choice["index"])):
        logprobs = choice["logprobs"]
        assert {len(column) for column in logprobs.values()} == {len(prompt) + 1}
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        numbers = logprobs["token_logprobs"][len(context) : -1]
        tops = logprobs["top_logprobs"][len(context) : -1]
        found.append((sum(numbers), all(number == max(top.values()) for number, top in zip(numbers, tops))))
    assert found[0][1] and not found[1][1]
    assert found[0][0] > found[1][0]


def test_echo_without_new_tokens_scores_the_prompt_alone(server: ServerProcess) -> None:
    text = "One two three"
    asked = {"prompt": text, "echo": True, "logprobs": 2, "max_tokens": 0, "temperature": 0}
    reply = server.post("/v1/completions", asked).json()
    logprobs = reply["choices"][0]["logprobs"]
    assert reply["choices"][0]["text"] == text == "".join(logprobs["tokens"])
    assert len(logprobs["tokens"]) == len(_ids(server, text)) == reply["usage"]["prompt_tokens"]
    assert [text[i:].startswith(token) for i, token in zip(logprobs["text_offset"], logprobs["tokens"])] == [True] * 3
    assert reply["usage"]["completion_tokens"] == 0


def test_a_streamed_echo_equals_the_whole(server: ServerProcess) -> None:
    asked = {"prompt": "One two three", "echo": True, "logprobs": 2, "max_tokens": 4, "temperature": 0}
    whole = server.post("/v1/completions", asked).json()["choices"][0]
    with server.http.stream("POST", "/v1/completions", json=asked | {"stream": True}) as response:
        events = [line[6:] for line in response.iter_lines() if line]
    parts = [msgspec.json.decode(event)["choices"][0] for event in events[:-1]]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for column in ("tokens", "text_offset"):
        assert [x for part in parts for x in part["logprobs"][column]] == whole["logprobs"][column]


def test_chat_logprobs_sum_up_and_carry_bytes(server: ServerProcess) -> None:
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Say hi with an emoji 👋"}],
        "logprobs": True,
        "top_logprobs": 3,
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    choice = server.post("/v1/chat/completions", asked).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 8
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] == max(top["logprob"] for top in entry["top_logprobs"])
        assert -9999 <= entry["logprob"] <= 0
    assert (
        bytes(b for entry in content for b in entry["bytes"]).decode("utf-8", "replace") == choice["message"]["content"]
    )


def test_prompt_logprobs_in_vllms_shape(server: ServerProcess) -> None:
    asked = {"prompt": "One two three", "prompt_logprobs": 1, "max_tokens": 1, "temperature": 0}
    first, *others = server.post("/v1/completions", asked).json()["choices"][0]["prompt_logprobs"]
    ids = _ids(server, "One two three")
    assert first is None and len(others) == len(ids) - 1
    for token_id, entry in zip(ids[1:], others):
        assert set(entry[str(token_id)]) == {"logprob", "rank", "decoded_token"}


def test_combinations_that_mean_nothing_are_refused(server: ServerProcess) -> None:
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
    check_error(server.post("/v1/chat/completions", chat | {"top_logprobs": 2}), 400, param="top_logprobs")
    check_error(
        server.post("/v1/chat/completions", chat | {"logprobs": True, "top_logprobs": 99}), 400, param="top_logprobs"
    )
    stream = {"prompt": "a", "stream": True}
    check_error(
        server.post("/v1/completions", stream | {"prompt_logprobs": 1}), 400, param="prompt_logprobs", words="stream"
    )
    check_error(server.post("/v1/completions", stream | {"echo": True, "logprobs": 1, "n": 2}), 400, param="n")


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 2}, {"echo": True, "logprobs": 2}])
def test_more_prompt_logprobs_than_are_sent_are_refused(server: ServerProcess, asked: dict[str, Any]) -> None:
    body = {"prompt": [[5] * 2000] * 50, "max_tokens": 1} | asked
    check_error(server.post("/v1/completions", body), 400, param="prompt_logprobs", words="300000 entries")


class _Twins:
    """A tokenizer where tokens 1, 2 and 3 have the same text."""

    token_text = staticmethod(lambda token_id: {1: "x", 2: "x", 3: "x"}.get(token_id, f"t{token_id}"))
    token_bytes = staticmethod(lambda token_id: b"x" if token_id in (1, 2, 3) else b"\xf0")


TWINS: Any = _Twins()
INFINITE = -math.inf


def test_tokens_of_equal_text_stay_apart_and_the_chosen_one_keeps_its_name() -> None:
    """is_greedy by value or by name: neither may be fooled by another token with the same text."""
    entry = TokenLogprobs(2, -1.5, 2, [(1, -0.5), (2, -1.5), (3, -2.5), (4, INFINITE)])
    reply = CompletionLogprobsWriter(TWINS, 4).write([9, 2], [None, entry])
    assert reply.tokens == ["t9", "x"] and reply.text_offset == [0, 2]
    assert reply.token_logprobs == [None, -1.5]
    assert reply.top_logprobs == [None, {"token_id:1": -0.5, "x": -1.5, "token_id:3": -2.5, "t4": -9999.0}]


def test_the_chosen_token_is_in_the_map_even_if_unlikely() -> None:
    entry = TokenLogprobs(7, INFINITE, 900, [(1, -0.5)])
    assert CompletionLogprobsWriter(TWINS, 1).write([7], [entry]).top_logprobs == [{"x": -0.5, "t7": -9999.0}]


def test_infinity_never_reaches_json() -> None:
    entry = TokenLogprobs(5, INFINITE, 3, [(1, INFINITE)])
    content = chat_logprobs([entry], TWINS, 1).content[0]
    assert content.logprob == content.top_logprobs[0].logprob == -9999.0 and content.bytes == [0xF0]
    assert prompt_logprobs([None, entry], TWINS, 1)[1] == {
        "5": {"logprob": -9999.0, "rank": 3, "decoded_token": "t5"},
        "1": {"logprob": -9999.0, "rank": 1, "decoded_token": "x"},
    }
