"""RequestText: Outputs in, what a user reads out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.text.request_text import RequestText, TextDelta
from tessera.text.tokenizer import Tokenizer
from tessera.types import CompletionOutput, Logprob, Output, Request, SamplingParams, TokenLogprobs

END = 2


def make(tokenizer: Tokenizer, **params: Any) -> RequestText:
    return RequestText(Request("r", [9690, 198], SamplingParams(**params)), tokenizer, "prompt")


def output(ids: list[int], finish: Any = None, stop_id: int | None = None, index: int = 0, **more: Any) -> Output:
    return Output("r", index, ids, finish_reason=finish, stop_token_id=stop_id, **more)


def entry(token_id: int, logprob: float = -1.0) -> TokenLogprobs:
    return TokenLogprobs(token_id, logprob, 2, [(5, -0.5), (token_id, logprob)])


def first(text: RequestText) -> CompletionOutput:
    return text.result().outputs[0]


def run(text: RequestText, ids: list[int], finish: Any = "length", *, logprobs: bool = False) -> list[TextDelta]:
    """One token an Output, as the engine sends them."""
    deltas = []
    for i, token_id in enumerate(ids):
        reason = finish if i == len(ids) - 1 else None
        deltas.append(text.feed(output([token_id], reason, logprobs=[entry(token_id)] if logprobs else None)))
    return deltas


def test_text_is_streamed_and_the_result_is_its_sum(smollm: Tokenizer) -> None:
    text, ids = make(smollm, max_tokens=99), smollm.encode("Hello 🙂 world")
    deltas = run(text, ids)
    assert "".join(delta.text for delta in deltas) == "Hello 🙂 world"
    assert "\ufffd" not in "".join(delta.text for delta in deltas)
    assert first(text) == CompletionOutput(0, "Hello 🙂 world", ids, None, None, "length", None)
    assert text.finished
    assert text.num_output_tokens == len(ids)
    assert text.result().prompt == "prompt"


def test_end_token_is_counted_but_not_shown(smollm: Tokenizer) -> None:
    hi = smollm.encode("Hi")
    for skip in (True, False):
        text = make(smollm, skip_special_tokens=skip)
        delta = text.feed(output([*hi, END], "stop", END))
        assert (delta.text, delta.token_ids, delta.finish_reason, delta.stop_reason) == ("Hi", [*hi, END], "stop", None)
        assert not delta.abort
    text = make(smollm, skip_special_tokens=False, include_stop_str_in_output=True)
    assert text.feed(output([*hi, END], "stop", END)).text == "Hi<|im_end|>"


def test_a_stop_token_id_is_the_stop_reason_and_its_text_is_left_out(smollm: Tokenizer) -> None:
    hi, dot = smollm.encode("Hi"), smollm.encode(".")[0]
    text = make(smollm, stop_token_ids=[dot])
    delta = text.feed(output([*hi, dot], "stop", dot))
    assert (delta.text, delta.stop_reason, first(text).token_ids) == ("Hi", dot, [*hi, dot])


def test_a_stop_string_ends_the_text_and_aborts_the_sequence(smollm: Tokenizer) -> None:
    ids = smollm.encode("one two three four")
    text = make(smollm, stop=[" three"], logprobs=0, max_tokens=99)
    deltas = [text.feed(output([i], logprobs=[entry(i)])) for i in ids]
    assert "".join(delta.text for delta in deltas) == "one two"
    assert [delta.abort for delta in deltas] == [False, False, True, False]
    assert deltas[2].finish_reason == "stop"
    assert deltas[3] == TextDelta(0)
    result = first(text)
    assert (result.text, result.token_ids, result.stop_reason) == ("one two", ids[:3], " three")
    assert result.logprobs is not None and [next(iter(table)) for table in result.logprobs] == ids[:3]
    assert result.cumulative_logprob == -3.0


def test_a_stop_string_inside_one_output_drops_the_tokens_after_it(smollm: Tokenizer) -> None:
    ids = smollm.encode("one two three four")
    text = make(smollm, stop=["wo"], include_stop_str_in_output=True, logprobs=0)
    delta = text.feed(output(ids, logprobs=[entry(i) for i in ids]))
    assert (delta.text, delta.token_ids, delta.abort) == ("one two", ids[:2], True)
    assert delta.logprobs is not None and len(delta.logprobs) == 2


def test_a_stop_string_completed_by_the_last_token_needs_no_abort(smollm: Tokenizer) -> None:
    text = make(smollm, stop=["two"])
    delta = text.feed(output(smollm.encode("one two"), "length"))
    assert (delta.text, delta.finish_reason, delta.stop_reason, delta.abort) == ("one ", "stop", "two", False)


def test_held_text_is_given_out_at_the_end(smollm: Tokenizer) -> None:
    text, ids = make(smollm, stop=["two three four"]), smollm.encode("one two three")
    deltas = [text.feed(output([i])) for i in ids]
    assert [delta.text for delta in deltas] == ["one", " ", ""]
    assert [delta.token_ids for delta in deltas] == [ids[:1], [], []]
    last = text.feed(output([END], "stop", END))
    assert (last.text, last.token_ids) == ("two three", [*ids[1:], END])


def test_min_tokens_lets_stop_strings_pass(smollm: Tokenizer) -> None:
    ids = smollm.encode("a b a b")
    text = make(smollm, stop=["b"], min_tokens=2)
    run(text, ids, None)
    assert (first(text).text, len(first(text).token_ids)) == ("a b a ", 4)


def test_an_unfinished_character_at_the_end_becomes_a_replacement(smollm: Tokenizer) -> None:
    ids = smollm.encode("𝄞")[:-1]
    text = make(smollm)
    deltas = run(text, ids)
    assert [delta.text for delta in deltas] == [*[""] * (len(ids) - 1), "\ufffd"]
    assert first(text).text == smollm.decode(ids)


def test_logprobs_hold_the_sampled_token_first_and_texts(smollm: Tokenizer) -> None:
    hi = smollm.encode(" Hi")[0]
    text = make(smollm, logprobs=2, prompt_logprobs=1)
    delta = text.feed(output([hi], "length", logprobs=[entry(hi, -2.5)], prompt_logprobs=[None, entry(7)]))
    table = {hi: Logprob(-2.5, 2, " Hi"), 5: Logprob(-0.5, 1, smollm.token_text(5))}
    assert first(text).logprobs == [table]
    assert list((first(text).logprobs or [])[0]) == [hi, 5]
    assert delta.prompt_logprobs == [None, entry(7)]
    prompt_logprobs = text.result().prompt_logprobs
    assert prompt_logprobs is not None and prompt_logprobs[0] is None and 7 in (prompt_logprobs[1] or {})


def test_sequences_are_apart(smollm: Tokenizer) -> None:
    text = make(smollm, n=2, stop=["b"], seed=1)
    a, b = smollm.encode("a")[0], smollm.encode("b")[0]
    assert text.feed(output([a], index=1)).text == "a"
    assert text.feed(output([b], index=0)).abort
    assert [done.finish_reason for done in text.result().outputs] == ["stop", None]
    text.feed(output([a], "length", index=1, num_cached_tokens=1))
    assert text.finished
    assert [(done.text, done.finish_reason) for done in text.result().outputs] == [("", "stop"), ("aa", "length")]
    assert text.result().num_cached_tokens == 1


@pytest.mark.parametrize("finish", ["length", "abort"])
def test_an_end_without_tokens_is_taken(smollm: Tokenizer, finish: str) -> None:
    delta = make(smollm, max_tokens=0).feed(output([], finish))
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", [], finish)


@given(
    data=st.data(),
    ids=st.lists(st.integers(0, 600), max_size=20),
    stops=st.lists(st.text("et 01", min_size=1, max_size=2), max_size=3),
)
def test_deltas_add_up_to_the_result_however_outputs_are_cut(
    smollm: Tokenizer, data: st.DataObject, ids: list[int], stops: list[str]
) -> None:
    whole, parts = make(smollm, stop=stops, logprobs=0), make(smollm, stop=stops, logprobs=0)
    for token_id in ids:
        whole.feed(output([token_id], logprobs=[entry(token_id)]))
    whole.feed(output([], "length"))
    deltas, left = [], ids
    while left:
        size = data.draw(st.integers(1, len(left)))
        deltas.append(parts.feed(output(left[:size], logprobs=[entry(i) for i in left[:size]])))
        left = left[size:]
    deltas.append(parts.feed(output([], "length")))
    assert first(whole) == first(parts)
    assert "".join(delta.text for delta in deltas) == first(whole).text
    assert list(itertools.chain(*(delta.token_ids for delta in deltas))) == first(whole).token_ids
    assert len(list(itertools.chain(*(delta.logprobs or [] for delta in deltas)))) == len(first(whole).token_ids)
    if not stops:
        assert first(whole).text == smollm.decode(ids)
