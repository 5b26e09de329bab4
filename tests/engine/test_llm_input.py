"""What `LLM` is handed that it cannot take: refused by name before the engine sees any of it, in Python's words."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest

from tessera import LLM, SamplingParams
from tessera.config import ModelConfig
from tessera.engine.keywords import as_keywords, keywords_for_flags
from tessera.engine.prompts import each_conversation, each_prompt, params_for, read_prompt
from tessera.errors import ConfigError, RequestError
from tessera.model.source import find_model
from tessera.text.tokenizer import Tokenizer, load_tokenizer


class NoEngine:
    """Refuses to be asked for anything."""

    def __getattr__(self, name: str) -> None:
        raise AssertionError(f"the engine was asked for {name}")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(find_model(ModelConfig()), ModelConfig())


@pytest.fixture
def llm(tokenizer: Tokenizer) -> LLM:
    """One without an engine: nothing here may get that far."""
    made: Any = object.__new__(LLM)
    made._engine, made._tokenizer, made._ids, made._lock = NoEngine(), tokenizer, itertools.count(), threading.Lock()
    instance: LLM = made
    return instance


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (5, "prompts must be a prompt or a list of prompts, got 5"),
        (None, "prompts must be a prompt or a list of prompts, got None"),
        (b"text", "prompts must be a prompt or a list of prompts, got b'text'"),
        ([None], "prompts[0] must be a prompt, got None"),
        (["good", None], "prompts[1] must be a prompt, got None"),
        (["good", 5], "prompts[1] must be a prompt, got 5"),
        ([5, "good"], "token ids are whole numbers, number 1 of the prompt is 'good'"),
        ([[5], [5, None]], "token ids are whole numbers, number 1 of prompts[1] is None"),
        ([[True]], "token ids are whole numbers, number 0 of prompts[0] is True"),
        ([{}], "prompts[0] has the keys [], only prompt and prompt_token_ids are taken"),
        ({"text": "a", 1: 2}, "the prompt has the keys ['text', 1], only prompt and prompt_token_ids are taken"),
        ({"prompt": 5}, 'the text of the prompt must be under "prompt", got 5'),
        ({"prompt": 5, "prompt_token_ids": [1]}, 'the text of the prompt must be under "prompt", got 5'),
        ({"prompt_token_ids": 5}, 'the token ids of the prompt must be a list under "prompt_token_ids", got 5'),
        ({"prompt_token_ids": "ab"}, "token ids are whole numbers, number 0 of the prompt is 'a'"),
    ],
)
def test_what_is_no_prompt_is_refused_with_what_a_prompt_may_be(llm: LLM, prompts: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts, use_tqdm=False)
    assert caught.value.message == says
    assert "a text, a list of token ids, {" in str(caught.value.hint)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("params", "says", "hint"),
    [
        (
            {"max_tokens": 2},
            "sampling_params must be a SamplingParams, or a list of them, got {'max_tokens': 2}",
            "write SamplingParams(**{...})",
        ),
        (
            [{"max_tokens": 2}],
            "sampling_params[0] must be a SamplingParams, got {'max_tokens': 2}",
            "write SamplingParams(**{...})",
        ),
        (16, "sampling_params must be a SamplingParams, or a list of them, got 16", "as in SamplingParams("),
        ([None], "sampling_params[0] must be a SamplingParams, got None", "as in SamplingParams("),
        ([SamplingParams()] * 2, "1 prompts were given and 2 sampling_params", "one a prompt"),
    ],
)
def test_what_is_no_sampling_is_refused_with_how_to_write_it(llm: LLM, params: Any, says: str, hint: str) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(["a"], params, use_tqdm=False)
    assert caught.value.message == says
    assert hint in str(caught.value.hint)
    assert caught.value.param == "sampling_params"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages is empty"),
        ([[]], "messages[0] is empty"),
        (None, "messages must be a list of messages, or a list of such lists, got None"),
        ("hello", "messages must be a list of messages, or a list of such lists, got 'hello'"),
        ({"role": "user", "content": "x"}, "messages must be a list of messages, or a list of such lists, got {"),
        (["hello"], "messages[0] must be an object with a role, got 'hello'"),
        ([{"role": "user"}], "messages[0] has no content"),
        (
            [{"role": "wizard", "content": "x"}],
            "messages[0].role must be one of system, developer, user, assistant, got 'wizard'",
        ),
        ([[{"role": "user", "content": "x"}], [{"role": "user"}]], "messages[1][0] has no content"),
        ([[{"role": "user", "content": "x"}], None], "messages[1] must be a list of messages, got None"),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_place(llm: LLM, messages: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        llm.chat(messages, use_tqdm=False)
    assert says in caught.value.message
    assert str(caught.value.param).startswith("messages")


def test_every_form_of_a_prompt_is_read(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("sea")
    forms: Any = ["sea", ids, tuple(ids), {"prompt": "sea"}, {"prompt_token_ids": ids}]
    named = each_prompt(forms)
    assert [place for place, _ in named] == [f"prompts[{i}]" for i in range(5)]
    assert [read_prompt(prompt, place, tokenizer)[1] for place, prompt in named] == [ids] * 5
    assert each_prompt("sea") == [("the prompt", "sea")]
    assert each_prompt(ids) == each_prompt(tuple(ids)) == [("the prompt", ids)]
    assert each_prompt([]) == []
    assert params_for(2, None) == params_for(2, SamplingParams()) == [SamplingParams()] * 2


def test_one_conversation_or_several_may_be_lists_or_tuples() -> None:
    turn = {"role": "user", "content": "x"}
    assert each_conversation([turn]) == each_conversation((turn,)) == [[turn]]
    assert each_conversation([[turn], (turn, turn)]) == [[turn], [turn, turn]]


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"enforce_eager": True}, "it is cuda_graphs=False here"),
        ({"block_size": 16}, "it is page_size here"),
        ({"max_num_seqs": 0}, "mend max_num_seqs"),
        ({"tensor_parallel_size": 2}, "leave tensor_parallel_size out"),
        ({"max_model_length": 5}, "did you mean 'max_model_len'?"),
    ],
)
def test_a_wrong_setting_is_refused_in_the_words_of_python(settings: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(**settings)
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("flags", "keywords"),
    [
        ("use --max-model-len 64, or --page-size 32", "use max_model_len 64, or page_size 32"),
        ("--no-cuda-graphs", "cuda_graphs=False"),
        ("`tessera serve --help` and a--model", "`tessera serve --help` and a--model"),
        ("--no-page-size --unheard-of", "--no-page-size --unheard-of"),
    ],
)
def test_only_flags_of_settings_are_renamed(flags: str, keywords: str) -> None:
    assert as_keywords(flags) == keywords


def test_an_error_keeps_all_else_when_its_flags_are_renamed() -> None:
    with pytest.raises(RequestError) as caught, keywords_for_flags():
        raise RequestError("--dtype it is", None, "prompt")
    assert (caught.value.args, caught.value.hint, caught.value.param) == (("dtype it is",), None, "prompt")
    assert str(caught.value) == "dtype it is"
