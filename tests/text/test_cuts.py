"""Tokens fed in pieces of any size say what they say one by one: that is why those that wait may be taken together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tessera.text.detokenizer import make_detokenizer
from tessera.text.outputs import joined
from tessera.text.parts import TokenizerParts
from tessera.text.pieces import Spelling
from tessera.text.request_text import MAX_GATHERED, RequestText, TextDelta
from tessera.text.tokenizer import Tokenizer
from tessera.types import Output, Request, RequestOutput, SamplingParams, TokenLogprobs

END = 2


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    """A vocabulary whose decoder is none that we know."""
    backend = Backend(models.WordLevel({"one": 0, "two": 1, "</s>": 2, "##s": 3, ",": 4, "中": 5}, unk_token="two"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(TokenizerParts(backend=backend))


@pytest.fixture(scope="session", params=list(Spelling))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """One of each way to spell text."""
    names = {Spelling.BYTE_LEVEL: "smollm", Spelling.BYTE_FALLBACK: "sentence_piece", Spelling.OTHER: "words"}
    found: Tokenizer = request.getfixturevalue(names[request.param])
    assert found.pieces.spelling is request.param
    return found


def ids_of(draw: Callable[[st.SearchStrategy[Any]], Any], tokenizer: Tokenizer) -> list[int]:
    """Any tokens, whole characters of several tokens and special tokens among them more often than by chance."""
    characters = tokenizer.encode("a🙂é中𝄞 lo", add_special_tokens=False)
    last = min(tokenizer.vocab_size, 400) - 1
    one = st.integers(0, last).map(lambda token_id: [token_id])
    some = st.one_of(one, one, st.just(characters), st.just([END]), st.just(characters[:4]))
    return [token_id for part in draw(st.lists(some, max_size=12)) for token_id in part]


def engine_outputs(ids: list[int], params: SamplingParams, end: str | None) -> list[Output]:
    """One token an Output, as the engine sends them; `end` says whether the last one is an end token."""
    outputs = []
    for i, token_id in enumerate(ids):
        is_last = i == len(ids) - 1
        logprobs = None if params.logprobs is None else [TokenLogprobs(token_id, -float(i), 1, [(token_id, -float(i))])]
        finish: Any = end if is_last else None
        stop_id = token_id if finish == "stop" else None
        outputs.append(Output("r", 0, [token_id], logprobs, [None] if i == 0 else None, finish, stop_id, 16 * (i == 0)))
    return outputs


def said(deltas: list[TextDelta]) -> tuple[str, list[int], list[TokenLogprobs], list[Any]]:
    """All the deltas together, and how they end."""
    ends = [(delta.finish_reason, delta.stop_reason) for delta in deltas if delta.finish_reason is not None]
    logprobs = [entry for delta in deltas for entry in delta.logprobs or []]
    return "".join(d.text for d in deltas), [i for d in deltas for i in d.token_ids], logprobs, ends


def cut(draw: Callable[[st.SearchStrategy[Any]], Any], outputs: list[Output]) -> list[list[Output]]:
    """`outputs` in pieces of random sizes."""
    pieces, left = [], outputs
    while left:
        size = draw(st.integers(1, len(left)))
        pieces.append(left[:size])
        left = left[size:]
    return pieces


@given(data=st.data())
def test_outputs_joined_in_any_way_say_what_they_say_one_by_one(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = ids_of(data.draw, tokenizer)
    params = SamplingParams(
        max_tokens=100,
        stop=data.draw(st.lists(st.text("ae l中🙂", min_size=1, max_size=2), max_size=2)),
        min_tokens=data.draw(st.sampled_from([0, 0, 3, 7])),
        skip_special_tokens=data.draw(st.booleans()),
        include_stop_str_in_output=data.draw(st.booleans()),
        stop_token_ids=data.draw(st.sampled_from([[], ids[-1:]])),
        logprobs=data.draw(st.sampled_from([None, 0])),
        prompt_logprobs=0,
    )
    outputs = engine_outputs(ids, params, data.draw(st.sampled_from([None, "length", "stop"])))
    found = []
    for pieces in ([[output] for output in outputs], cut(data.draw, outputs)):
        text = RequestText(Request("r", [0], params), tokenizer, "prompt")
        deltas = [text.feed(joined(piece)) for piece in pieces]
        if not text.finished:
            deltas.append(text.feed(Output("r", 0, [], finish_reason="length")))
        found.append((said(deltas), text.result(), text.num_output_tokens))
        assert said(deltas)[:2] == (text.result().outputs[0].text, text.result().outputs[0].token_ids)
    assert found[0] == found[1]


@given(data=st.data())
def test_a_stop_string_aborts_what_the_engine_has_not_ended(smollm: Tokenizer, data: st.DataObject) -> None:
    outputs = engine_outputs(smollm.encode("one two three four five"), SamplingParams(), "length")
    text = RequestText(Request("r", [0], SamplingParams(stop=["three"])), smollm, None)
    for piece in cut(data.draw, outputs):
        delta = text.feed(joined(piece))
        if delta.finish_reason is not None:
            assert delta.abort == (piece[-1].finish_reason is None)
    assert (text.result().outputs[0].text, text.num_output_tokens) == ("one two ", 3)


@given(data=st.data(), skip=st.booleans())
def test_detokenizers_hold_back_no_more_tokens_than_one_by_one(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    """And after each piece as many, whatever its size."""
    ids = ids_of(data.draw, tokenizer)
    whole, parts = (make_detokenizer(tokenizer, [0], skip_special_tokens=skip) for _ in range(2))
    left = ids
    while left:
        size = data.draw(st.integers(1, len(left)))
        one_by_one = "".join(whole.feed([token_id]) for token_id in left[:size])
        assert parts.feed(left[:size]) == one_by_one
        assert parts.num_open == whole.num_open
        left = left[size:]
    assert parts.flush() == whole.flush()


def test_a_token_whose_character_is_not_complete_is_held_back(smollm: Tokenizer) -> None:
    ids = smollm.encode("ab𝄞", add_special_tokens=False)
    text = RequestText(Request("r", [0], SamplingParams()), smollm, None)
    first = text.feed(Output("r", 0, ids[:-1]))
    assert (first.text, first.token_ids) == ("ab", smollm.encode("ab", add_special_tokens=False))
    second = text.feed(Output("r", 0, ids[-1:]))
    assert (second.text, first.token_ids + second.token_ids) == ("𝄞", ids)


@pytest.mark.parametrize("stop", [[], ["7"]])
def test_gathering_gives_the_same_result_and_makes_text_rarely(smollm: Tokenizer, stop: list[str]) -> None:
    """With a stop string each token has its turn, for it may be the last."""
    params = SamplingParams(max_tokens=1000, n=2, stop=stop, logprobs=0, prompt_logprobs=0)
    ids = smollm.encode("🙂 and a 6 or an 8 " * 12)
    outputs = engine_outputs(ids, params, "length")
    results: list[RequestOutput] = []
    for gathers in (False, True):
        text = RequestText(Request("r", [0], params), smollm, None)
        deltas = []
        for output in outputs:
            for index in range(2):
                each = Output("r", index, *[getattr(output, name) for name in Output.__struct_fields__[2:]])
                deltas.append(text.gather(each) if gathers else text.feed(each))
        assert text.finished
        results.append(text.result())
        rare = gathers and not stop
        assert sum(delta is not None for delta in deltas) == 2 * (-(-len(ids) // MAX_GATHERED) if rare else len(ids))
    assert dataclasses.asdict(results[0]) == dataclasses.asdict(results[1])


def test_a_character_that_is_cut_off_by_another_holds_nothing_before_that_one_back(smollm: Tokenizer) -> None:
    """A byte, a special token, and a byte that begins anew: the first is U+FFFD by then, and its token out."""
    begun = next(i for i in range(300) if smollm.token_bytes(i) == b"\xe2")
    whole, parts = (make_detokenizer(smollm, [0]) for _ in range(2))
    for token_id in (begun, 2, begun):
        whole.feed([token_id])
    assert parts.feed([begun]) + parts.feed([2, begun]) == "\N{REPLACEMENT CHARACTER}"
    assert parts.num_open == whole.num_open == 1
