"""Every field of every body, given nonsense: a 4xx in OpenAI's shape, and nothing else notices."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from server_process import ServerProcess, check_error
from tessera.server.schema import REFUSED, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

LONG_LIST = list(range(50_000))
VALUES: dict[str, str] = {
    "true": "true",
    "negative": "-7",
    "huge": "1" + "0" * 40,
    "infinite": "1e999",
    "nan": "NaN",
    "fraction": "0.123",
    "text": '"\\u0000 nonsense \\ud800"',
    "empty text": '""',
    "list": '[null, "x", {}]',
    "long list": json.dumps(LONG_LIST),
    "object": '{"a": {"b": []}}',
}
ROUTES: dict[str, tuple[type[msgspec.Struct], dict[str, Any]]] = {
    "/v1/completions": (CompletionBody, {"prompt": "a b", "max_tokens": 1}),
    "/v1/chat/completions": (ChatBody, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
    "/tokenize": (TokenizeBody, {"prompt": "a"}),
    "/detokenize": (DetokenizeBody, {"tokens": [1]}),
}
FIELDS = [(path, name) for path, (kind, _) in ROUTES.items() for name in kind.__struct_fields__] + [
    (path, name) for path in list(ROUTES)[:2] for name in REFUSED
]
STORY: dict[str, Any] = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 40, "ignore_eos": True}


def _raw_body(body: dict[str, Any], name: str, value: str) -> bytes:
    others = {key: other for key, other in body.items() if key != name}
    return (json.dumps(others)[:-1] + (", " if others else "") + f"{json.dumps(name)}: {value}}}").encode()


@pytest.fixture(scope="module")
def bystander(server: ServerProcess) -> Iterator[None]:
    """A story told again and again beside all these tests, which must come out as it does alone."""
    expected = server.post("/v1/completions", STORY).json()["choices"][0]["text"]
    texts: list[str] = []
    done = threading.Event()

    def tell() -> None:
        while not done.wait(1):
            texts.append(server.post("/v1/completions", STORY).json()["choices"][0]["text"])

    thread = threading.Thread(target=tell)
    thread.start()
    yield
    done.set()
    thread.join()
    assert texts and set(texts) == {expected}


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(("path", "name"), FIELDS, ids=lambda value: value)
def test_no_value_of_a_field_gives_anything_but_an_answer_or_a_4xx(server: ServerProcess, path: str, name: str) -> None:
    body = ROUTES[path][1]
    for label, value in VALUES.items():
        response = server.http.post(path, content=_raw_body(body, name, value))
        if response.status_code != 200:
            assert 400 <= response.status_code < 500, (label, response.text[:300])
            assert len(check_error(response, response.status_code)["message"]) < 1000, label
        elif value != "true":
            assert "nan" not in response.text.lower(), label
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 129),
        ("n", 10**9),
        ("n", 0),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("max_tokens", -1),
        ("max_tokens", 10**6),
        ("max_completion_tokens", "5"),
        ("min_tokens", 10**6),
        ("seed", 2**70),
        ("seed", 1.5),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 10**6),
        ("stop", [""]),
        ("stop", ["a"] * 1000),
        ("stop", "a" * 10**5),
        ("stop_token_ids", [10**9]),
        ("stop_token_ids", [-1]),
        ("logit_bias", {"5": 1000}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {"99999999": 1}),
        ("logit_bias", {"x": 1}),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("store", True),
        ("service_tier", "flex"),
        ("echo", 3),
        ("suffix", "end"),
        ("best_of", 4),
        ("chat_template", "{{ 7 * 7 }}"),
        ("guided_json", {}),
        ("unheard_of", 1),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused_by_the_fields_name(
    server: ServerProcess, field: str, value: object
) -> None:
    check_error(server.post("/v1/completions", {"prompt": "a b", field: value}), 400, words=field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("audio", {"voice": "x"}),
        ("modalities", ["audio"]),
        ("reasoning_effort", "high"),
        ("web_search_options", {}),
        ("prediction", {"type": "content", "content": "x"}),
        ("chat_template", "{% for i in range(10**9) %}{% endfor %}"),
        ("chat_template_kwargs", {"a": 1}),
        ("stream_options", {"include_usage": True}),
        ("messages", []),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "nobody", "content": "a"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]),
        ("messages", [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]),
        ("messages", [{"role": "user", "content": "a", "x": 1}]),
        ("messages", [{"role": "user", "content": "a"}] * 5000),
    ],
)
def test_what_a_chat_cannot_do_is_refused_by_name(server: ServerProcess, field: str, value: object) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1} | {field: value}
    error = check_error(server.post("/v1/chat/completions", body), 400)
    assert error["param"] and error["param"].startswith(field), error


def test_values_that_ask_for_nothing_are_taken(server: ServerProcess) -> None:
    nothing = {name: values[-1] for name, values in REFUSED.items()}
    nulls = {name: None for name in CompletionBody.__struct_fields__ if name not in ("prompt", "max_tokens")}
    body = {"prompt": "a", "max_tokens": 1}
    for extra in (nothing, dict.fromkeys(REFUSED), nulls, {"best_of": 2, "n": 2}, {"best_of": 1}):
        response = server.post("/v1/completions", body | extra)
        assert response.status_code == 200, response.text
    history: dict[str, object] = {
        "role": "assistant",
        "content": "b",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
    }
    parts = [{"type": "text", "text": "a"}]
    messages = [{"role": "developer", "content": parts}, {"role": "user", "content": "x", "name": "y"}, history]
    chat_nulls = {name: None for name in ChatBody.__struct_fields__ if name not in ("messages", "max_tokens")}
    chat = {"messages": messages, "max_tokens": 1} | chat_nulls
    response = server.post("/v1/chat/completions", chat | nothing)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("path", "field"), [(path, next(iter(ROUTES[path][1]))) for path in ROUTES])
def test_null_where_something_is_needed_is_refused(server: ServerProcess, path: str, field: str) -> None:
    check_error(server.post(path, {field: None}), 400, param=field)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"prompt": "\xff"}', b'"x"'])
@pytest.mark.parametrize("path", ROUTES)
def test_a_body_that_is_no_json_object_is_refused(server: ServerProcess, path: str, raw: bytes) -> None:
    check_error(server.http.post(path, content=raw), 400)


@pytest.mark.parametrize("prompt", [[], "", [[]], [1, "a"], ["a", 1], [[1], "a"], [-1], [10**9], [1.5], [True], {}, 5])
def test_a_prompt_of_the_wrong_form_is_refused(server: ServerProcess, prompt: object) -> None:
    check_error(server.post("/v1/completions", {"prompt": prompt}), 400, param="prompt")


def test_half_a_surrogate_pair_is_refused(server: ServerProcess) -> None:
    check_error(server.http.post("/v1/completions", content=b'{"prompt": "a\\ud800"}'), 400)
    chat = b'{"messages": [{"role": "user", "content": "\\udfff"}]}'
    check_error(server.http.post("/v1/chat/completions", content=chat), 400)


def test_a_body_above_the_limit_is_refused_whether_or_not_it_says_its_size(server: ServerProcess) -> None:
    megabyte = b"x" * 2**20
    check_error(server.http.post("/v1/completions", content=megabyte * 33), 413, words="33554432")
    check_error(server.http.post("/v1/completions", content=(megabyte for _ in range(40))), 413)


def test_a_packed_body_is_refused_by_its_coding(server: ServerProcess) -> None:
    packed = gzip.compress(b'{"prompt": "a", "max_tokens": 1}')
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        answer = server.http.post(path, content=packed, headers={"content-encoding": "gzip"})
        assert check_error(answer, 415, words="'gzip'")["code"] == "unsupported_content_encoding"
        assert answer.headers["accept-encoding"] == "identity"
    body = b'{"prompt": "a", "max_tokens": 1}'
    for codings, status in (
        (["Identity"], 200),
        (["identity,identity", ""], 200),
        (["identity", "gzip"], 415),
        (["x,y"], 415),
    ):
        headers = [("content-encoding", coding) for coding in codings]
        assert server.http.post("/v1/completions", content=body, headers=headers).status_code == status, codings


def test_a_huge_prompt_is_refused_while_others_are_served(server: ServerProcess) -> None:
    """Ten megabytes of text are counted, not tokenised, and the event loop does not wait for them."""
    error = check_error(server.post("/v1/completions", {"prompt": "word " * 2_000_000}), 400, param="prompt")
    assert "10000000 characters" in error["message"]


def test_too_many_prompts_are_refused_before_any_is_read(server: ServerProcess) -> None:
    check_error(server.post("/v1/completions", {"prompt": ["a"] * 100_000}), 400, param="prompt", words="100000")


def test_unknown_paths_and_methods_answer_in_the_same_shape(server: ServerProcess) -> None:
    check_error(server.http.get("/v1/nothing"), 404)
    check_error(server.http.get("/v1/completions"), 405)
    check_error(server.http.delete("/v1/models"), 405)
    check_error(server.http.post("/v1/completions/"), 404)
