"""Conversations of ShareGPT become a trace: who asked, which are taken, and files that are cut short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fake_server import Fake
from tessera import cli
from tessera.bench.online.sharegpt import Limits, is_sharegpt, read_sharegpt
from tessera.bench.online.trace import Trace
from tessera.bench.online.trace_prompts import Vocabulary, calls_of
from tessera.bench.record import read
from tessera.errors import ConfigError


def _encode(text: str) -> list[int]:
    """A token is a character."""
    return [1000 + ord(letter) for letter in text]


def _talk(asked: str, answered: str, *, before: str | None = None) -> dict[str, Any]:
    first = [{"from": "gpt", "value": before}] if before is not None else []
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}, {"from": "human", "value": "more"}]
    return {"id": "x", "conversations": [*first, *turns]}


def _file(tmp_path: Path, talks: list[dict[str, Any]], *, cut: int = 0) -> Path:
    path = tmp_path / "sharegpt.json"
    text = json.dumps(talks, indent=2, ensure_ascii=False)
    path.write_bytes(text.encode()[: len(text.encode()) - cut])
    return path


def _read(path: Path, number: int, seed: int = 0, **limits: int) -> Trace:
    return read_sharegpt(path, _encode, number=number, rate=2.0, seed=seed, limits=Limits(**limits))


TALKS = [_talk(f"question {i:02d}", "a" * (10 + i)) for i in range(20)]


def test_the_first_question_is_asked_and_its_answer_gives_the_length(tmp_path: Path) -> None:
    path = _file(tmp_path, [_talk("what is it?", "an answer", before="welcome")])
    trace = _read(path, 1)
    assert is_sharegpt(path) and trace.prompts[0].text == "what is it?"
    assert (trace.arrivals[0].input_tokens, trace.arrivals[0].output_tokens) == (11, 9)
    [call] = calls_of(trace, Vocabulary(range(100, 500)), scale=1, salt=(0,))
    assert isinstance(call.prompt, list) and call.prompt[1:] == _encode("what is it?")[1:] and call.max_tokens == 9
    [text] = calls_of(trace, Vocabulary(), scale=1, salt=(0,))
    assert str(text.prompt).endswith(" what is it?")


def test_conversations_are_taken_by_their_lengths_as_vllm_does(tmp_path: Path) -> None:
    kept = [("abcd", "efgh"), ("p" * 1024, "a" * 1024)]
    left = [("abc", "efgh"), ("abcd", "efg"), ("p" * 1025, "efgh"), ("p" * 1024, "a" * 1025)]
    path = _file(tmp_path, [_talk(*each) for each in [*kept, *left]])
    assert sorted(prompt.text for prompt in _read(path, 2).prompts) == sorted(asked for asked, _ in kept)
    with pytest.raises(ConfigError, match="has 2 conversations of 4 to 2048 tokens, 3 are asked for") as refused:
        _read(path, 3)
    assert refused.value.hint == "use --num-requests 2"
    cut = _read(path, 3, longest_answer=500)
    assert sorted(each.output_tokens for each in cut.arrivals) == [4, 500, 500], "one fits once its answer is cut off"


def test_the_seed_decides_which_are_taken_and_when_they_come(tmp_path: Path) -> None:
    path = _file(tmp_path, TALKS)
    assert _read(path, 5).digest == _read(path, 5).digest
    assert len({_read(path, 5, seed).digest for seed in range(4)}) == 4
    assert len({tuple(prompt.text for prompt in _read(path, 5, seed).prompts) for seed in range(4)}) == 4
    times = [each.at_s for each in _read(path, 20).arrivals]
    assert times[0] == 0 and times == sorted(times) and 2 < times[-1] < 30, "2 a second"


@pytest.mark.parametrize("cut", [1, 5, 40, 100, 150])
def test_a_file_cut_short_is_read_as_far_as_it_goes(
    tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tessera.bench.online.sharegpt.PIECE_CHARACTERS", 37)
    whole = {prompt.text for prompt in _read(_file(tmp_path, TALKS), 20).prompts}
    assert len(whole) == 20 and "cut off" not in caplog.text
    path = _file(tmp_path, [*TALKS, _talk("who is Zoë?", "é" * 40)], cut=cut)
    number = 21 if cut == 1 else 20
    found = {prompt.text for prompt in _read(path, number).prompts}
    assert found >= whole and len(found) == number
    assert f"is cut off after {number} conversations" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '[{"conversations": []}, {oh}, {"conversations": []}, {"conversations": []}]',
            "element 2 of its array, is no",
        ),
        ('[{"prompt": "x"}]', "without `conversations`"),
        ("[[1, 2]]", "without `conversations`"),
        ("[]", "has no conversation"),
        ('[{"conversations": [{"from": "gpt", "value": "hello"}]}]', "has no conversation"),
    ],
)
def test_what_is_no_sharegpt_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        _read(path, 1)
    assert words in caught.value.message and caught.value.hint


def test_no_replay_begins_as_another_and_within_one_the_same_is_shared(tmp_path: Path) -> None:
    same = "a beginning that is longer than sixteen tokens, "
    trace = _read(_file(tmp_path, [_talk(same + "one", "answer"), _talk(same + "two", "answer")]), 2)
    share = 2 * (len(same) // 16 * 16) / (2 * (len(same) + 3)) / 2
    assert trace.shared_share == pytest.approx(share)
    for vocabulary in (Vocabulary(range(100, 5000)), Vocabulary()):
        first, second = (calls_of(trace, vocabulary, scale=1, salt=(salt,)) for salt in (0, 1))
        assert first[0].prompt[:20] == first[1].prompt[:20] and first[0].prompt[:20] != second[0].prompt[:20]


def test_conversations_are_replayed_with_the_tokens_of_the_model_that_is_named(
    tmp_path: Path, tiny_model: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = _file(tmp_path, TALKS, cut=30), tmp_path / "rows.jsonl"
    load = ["--trace", str(path), "--num-requests", "4", "--rate", "50", "--scales", "1", "--repeats", "1"]
    command = ["bench", "online", f"--url=x={fake.url('quick')}", *load, "--num-warmup", "0", "--out", str(out)]
    assert cli.main(command) == 2
    assert "add --model, the model that the URL serves" in capsys.readouterr().err
    assert cli.main([*command, f"--model={tiny_model}", "--max-output-len", "5"]) == 0
    [row] = read(out)
    sent = [each.body for each in fake.record("quick")]
    assert {len(body["prompt"]) for body in sent} == {len("question 00")} and {b["max_tokens"] for b in sent} == {5}
    assert str(row.case["trace"]).startswith("sharegpt.json (") and row.metrics["prompt_tok_s"] > 0
    assert cli.main([*command, f"--model={tiny_model}", "--chat"]) == 0
    texts = [each.body["messages"][0]["content"] for each in fake.record("quick")]
    assert all(" question " in text for text in texts) and read(out)[-1].case["endpoint"] == "chat"
