"""What a caller of `LLM` hands in, looked at before anything is computed: prompts, conversations, sampling."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

from tessera.errors import RequestError
from tessera.text.chat_template import plain_messages
from tessera.text.tokenizer import Tokenizer
from tessera.types import SamplingParams

Prompt = str | list[int] | dict[str, Any]
"""Text, token ids, or vLLM's `{"prompt": ...}` and `{"prompt_token_ids": ...}`."""

FORMS = 'a prompt is a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": token ids}'


def each_prompt(prompts: object) -> list[tuple[str, object]]:
    """Every prompt with the words that name it in an error; RequestError where it is neither a prompt nor a list."""
    if isinstance(prompts, str | dict):
        return [("the prompt", prompts)]
    if not _is_list(prompts):
        raise RequestError(f"prompts must be a prompt or a list of prompts, got {prompts!r:.60}", FORMS, "prompt")
    assert isinstance(prompts, Sequence)
    if len(prompts) and isinstance(prompts[0], int):
        return [("the prompt", list(prompts))]
    return [(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]


def read_prompt(prompt: object, place: str, tokenizer: Tokenizer) -> tuple[str | None, list[int]]:
    """Text, where there is one, and token ids; RequestError, which calls the prompt `place`, for anything else."""
    if isinstance(prompt, str):
        return prompt, tokenizer.encode(prompt)
    if isinstance(prompt, list | tuple):
        return None, _token_ids(prompt, place)
    if not isinstance(prompt, dict):
        raise RequestError(f"{place} must be a prompt, got {prompt!r:.60}", FORMS, "prompt")
    if not prompt or prompt.keys() - {"prompt", "prompt_token_ids"}:
        raise RequestError(
            f"{place} has the keys {list(prompt)!r:.80}, only prompt and prompt_token_ids are taken", FORMS, "prompt"
        )
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if not isinstance(text, str) and (text is not None or ids is None):
        raise RequestError(f'the text of {place} must be under "prompt", got {text!r:.60}', FORMS, "prompt")
    return text, tokenizer.encode(str(text)) if ids is None else _token_ids(ids, place)


def params_for(num_prompts: int, params: object) -> list[SamplingParams]:
    """One SamplingParams a prompt; RequestError for anything else, and where there are more or fewer of them."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if not _is_list(params):
        raise _no_params("sampling_params", params)
    assert isinstance(params, Sequence)
    for i, each in enumerate(params):
        if not isinstance(each, SamplingParams):
            raise _no_params(f"sampling_params[{i}]", each)
    if len(params) != num_prompts:
        raise RequestError(
            f"{num_prompts} prompts were given and {len(params)} sampling_params",
            "give one for all or one a prompt",
            "sampling_params",
        )
    return list(params)


def each_conversation(messages: object) -> list[list[dict[str, Any]]]:
    """Every conversation of `LLM.chat`, its messages checked; RequestError for what is neither one nor a list."""
    if not _is_list(messages):
        raise RequestError(
            f"messages must be a list of messages, or a list of such lists, got {messages!r:.60}",
            'a message is {"role": "user", "content": text}',
            "messages",
        )
    assert isinstance(messages, Sequence)
    if not len(messages) or not _is_list(messages[0]):
        return [plain_messages(list(messages))]
    return [plain_messages(list(each) if _is_list(each) else each, f"messages[{i}]") for i, each in enumerate(messages)]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _no_params(place: str, given: object) -> RequestError:
    hint = "write SamplingParams(**{...})" if isinstance(given, dict) else "as in SamplingParams(max_tokens=16)"
    what = f"must be a SamplingParams{', or a list of them' if place == 'sampling_params' else ''}"
    return RequestError(f"{place} {what}, got {given!r:.60}", hint, "sampling_params")


def _token_ids(given: Any, place: str) -> list[int]:
    try:
        ids = list(given)
    except TypeError:
        raise RequestError(
            f'the token ids of {place} must be a list under "prompt_token_ids", got {given!r:.60}', FORMS, "prompt"
        ) from None
    if set(map(type, ids)) <= {int}:
        return ids
    return [_token_id(token_id, i, place) for i, token_id in enumerate(ids)]


def _token_id(given: Any, i: int, place: str) -> int:
    """A whole number, one of numpy's too."""
    try:
        if isinstance(given, bool):
            raise TypeError
        return index(given)
    except TypeError:
        raise RequestError(
            f"token ids are whole numbers, number {i} of {place} is {given!r:.60}", FORMS, "prompt"
        ) from None
