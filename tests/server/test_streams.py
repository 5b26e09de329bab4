"""Streams to the letter, and what a client that leaves them leaves behind: nothing."""

from __future__ import annotations

import concurrent.futures
import json
import re
import socket
import time
from typing import Any
from urllib.parse import urlsplit

from server_process import ServerProcess, wait_for

LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0}


def _events(server: ServerProcess, path: str, body: dict[str, Any]) -> list[Any]:
    response = server.post(path, body | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert re.fullmatch(r"(?:data: \S[^\n]*\n\n)+", response.text), response.text[:300]
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")[:-1]]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_usage_is_sent_only_when_asked_for(server: ServerProcess) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "a", "max_tokens": 3})):
        for options in (None, {}, {"include_usage": False}):
            events = _events(server, path, body | {"stream_options": options})
            assert all("usage" not in event and event["choices"] for event in events)
        events = _events(server, path, body | {"stream_options": {"include_usage": True}})
        assert all(event["usage"] is None and len(event["choices"]) == 1 for event in events[:-1])
        assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] > 0
        assert "cached_tokens" in events[-1]["usage"]["prompt_tokens_details"]


def test_continuous_usage_counts_up(server: ServerProcess) -> None:
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    events = _events(server, "/v1/chat/completions", CHAT | options)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == 5


def test_each_of_several_streamed_choices_has_one_role_and_one_reason(server: ServerProcess) -> None:
    events = _events(server, "/v1/chat/completions", CHAT | {"n": 3, "temperature": 1, "seed": 3})
    choices = [event["choices"][0] for event in events]
    for index in range(3):
        mine = [choice for choice in choices if choice["index"] == index]
        assert [choice["delta"].get("role") for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [bool(choice["finish_reason"]) for choice in mine] == [False] * (len(mine) - 1) + [True]


def test_a_storm_of_disconnects_frees_every_page(server: ServerProcess) -> None:
    """Streams and plain calls cut off at once: the engine must drop them although nobody told it."""
    free = server.wait_until_idle()["pages_free"]
    address = (urlsplit(server.url).hostname, urlsplit(server.url).port)
    sockets = []
    for i in range(24):
        body = json.dumps(LONG | {"stream": i % 2 == 0, "n": 1 + i % 3, "prompt": f"{i} times upon"}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        sockets.append(socket.create_connection(address))
        sockets[-1].sendall(head + body)
    busy = wait_for(lambda: (status := server.status())["running"] > 20 and status)
    assert busy["pages_free"] < free
    for connection in sockets:
        connection.close()
    begun = time.monotonic()
    after = server.wait_until_idle(5)
    assert after["pages_free"] == free and time.monotonic() - begun < 5
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_stop_string_frees_the_sequence_at_once(server: ServerProcess) -> None:
    """The engine knows no stop strings: without word from the API process it would go on to 1500 tokens."""
    before = server.wait_until_idle()["generated_tokens"]
    reply = server.post("/v1/completions", LONG | {"stop": [" the"]}).json()
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert server.wait_until_idle(5)["generated_tokens"] - before < 200


def test_a_repeated_prompt_is_reported_as_cached(server: ServerProcess) -> None:
    body = {"prompt": list(range(1000, 1200)), "max_tokens": 1}
    counts = [server.post("/v1/completions", body).json()["usage"] for _ in range(2)]
    assert counts[0]["prompt_tokens_details"]["cached_tokens"] == 0
    assert 100 < counts[1]["prompt_tokens_details"]["cached_tokens"] < counts[1]["prompt_tokens"] == 200


def test_health_and_models_answer_at_once_while_the_engine_is_busy(server: ServerProcess) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(server.post, "/v1/completions", LONG | {"max_tokens": 24}) for _ in range(4)]
        wait_for(lambda: server.status()["running"] >= 2)
        for path in ("/", "/health", "/v1/models", "/version", "/v1/attention", "/metrics"):
            begun = time.monotonic()
            assert server.http.get(path).status_code == 200
            assert time.monotonic() - begun < 2
        assert all(job.result().status_code == 200 for job in running)


def test_attention_names_the_backend_and_the_reason_of_each_phase_and_proves_it(server: ServerProcess) -> None:
    told = server.http.get("/v1/attention").json()
    assert told["num_four_bit_layers"] == 0, "as this server was told"
    phases = told["phases"]
    assert set(phases) == {"prefill", "decode"}
    for phase, choice in phases.items():
        assert choice["backend"] and choice["reason"]
        assert all(reasons for reasons in choice["rejected"].values()) and "flash_attn:4" in choice["rejected"]
        (proof,) = choice["proofs"]
        assert (proof["phase"], proof["backend"]) == (phase, choice["backend"])
        assert 0 < proof["time_share"] < 1 and "torch" in proof["versions"] and proof["device"].startswith("cpu")
        assert all(use["name"] and use["calls"] >= 30 and use["microseconds"] > 0 for use in proof["symbols"])
    assert any("proven: " in line for line in server.lines)


def test_the_tokenizer_as_lm_eval_probes_it(server: ServerProcess) -> None:
    info = server.http.get("/tokenizer_info").json()
    tokens = server.post("/tokenize", {"prompt": "Hello wörld", "add_special_tokens": False}).json()
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 2048
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "Hello wörld"}
    eos = server.post("/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False}).json()["tokens"]
    assert eos == [info["eos_token_id"]]
    chat = server.post("/tokenize", {"messages": CHAT["messages"], "return_token_strs": True}).json()
    assert "".join(chat["token_strs"]).endswith("assistant\n")
