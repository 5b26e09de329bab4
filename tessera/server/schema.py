"""Request bodies: OpenAI's names, and vLLM's for what OpenAI has no name for.

A field is honoured, harmless, or refused by name; none is ignored. Fields that ask for something this
server does not do are accepted only with a value that asks for nothing (`REFUSED`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar

import msgspec

from tessera.errors import RequestError
from tessera.server.field_errors import field_error
from tessera.types import SamplingParams

MAX_BODY_BYTES = 32 * 2**20
MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
NUM_DEFAULT_TOKENS = 16
"""Tokens a completion has when it does not say, as OpenAI documents; a chat goes on until the context is full."""

_PARAMS = tuple(each.name for each in fields(SamplingParams))

BodyT = TypeVar("BodyT", bound=msgspec.Struct)

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None,),  # or equal to n
    "bad_words": (None, []),
    "cache_salt": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "length_penalty": (None, 1, 1.0),
    "modalities": (None, [], ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None, False, True),
    "prediction": (None,),
    "priority": (None, 0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "spaces_between_special_tokens": (None, True),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
"""Fields that are known but not honoured -> the values that ask for nothing, which are accepted."""

REFUSED_IN_MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "reasoning_content": (None, ""),
    "refusal": (None, ""),
    "tool_call_id": (None,),
    "tool_calls": (None, []),
}
"""The same for one message, so that an answer of this server can be sent back as history."""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What else a stream tells."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What completions and chats have in common; a field with the name of one of SamplingParams becomes it."""

    model: str | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[int, float] | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    skip_special_tokens: bool | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    user: str | None = None

    @property
    def max_tokens_given(self) -> bool:
        """Whether the client itself bounds the output."""
        return self.max_tokens is not None or self.max_completion_tokens is not None

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_always(self) -> bool:
        """Whether every chunk of a stream carries usage, and each token has a chunk, though it may show no text yet."""
        return bool(self.usage_wanted and self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionBody(SamplingBody, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    echo: bool | None = None
    logprobs: int | None = None


class ContentPart(msgspec.Struct, forbid_unknown_fields=True):
    """A piece of a message; of the types OpenAI has, only text is taken."""

    type: str
    text: str | None = None
    file: Any = None
    image_url: Any = None
    input_audio: Any = None
    video_url: Any = None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None
    name: str | None = None


class ChatBody(SamplingBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    add_generation_prompt: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TokenizeBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /tokenize, as vLLM has it: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


def parse_body(raw: bytes, kind: type[BodyT]) -> BodyT:
    """A request body of type `kind`; RequestError that names the field at fault."""
    try:
        body = msgspec.json.decode(raw)
    except RecursionError:
        raise RequestError("the body is nested too deeply", "no field needs more than a few levels") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", "look at that place, or at its quotes") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, got {body!r:.80}", "put the fields in braces")
    if "best_of" in body and body["best_of"] == (body.get("n") or 1):
        del body["best_of"]  # the best n of n are all of them
    _refuse(body, REFUSED, kind, "")
    messages = body.get("messages")
    if isinstance(messages, list):
        if len(messages) > MAX_MESSAGES:
            raise RequestError(
                f"{len(messages)} messages are too many, at most {MAX_MESSAGES} are taken", param="messages"
            )
        for i, message in enumerate(messages):
            if isinstance(message, dict):
                _refuse(message, REFUSED_IN_MESSAGES, Message, f"messages[{i}].")
    try:
        return msgspec.convert(body, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise field_error(str(error), body) from None


def _refuse(body: dict[str, Any], refused: Mapping[str, tuple[Any, ...]], kind: type[msgspec.Struct], at: str) -> None:
    """Take the fields of `refused` out of `body`; RequestError where one asks for something."""
    for name in refused.keys() & body.keys() - set(kind.__struct_fields__):
        value = body.pop(name)
        # by type too: 1 == True, and NaN equals nothing
        if not any(value == nothing and type(value) is type(nothing) for nothing in refused[name]):
            raise RequestError(f"{at}{name} is not supported: {value!r:.80}", "leave it out", param=at + name)


def sampling_params(body: SamplingBody, *, default_max_tokens: int | None, **given: Any) -> SamplingParams:
    """The sampling that `body` asks for; `given` wins over it. RequestError on an impossible value."""
    asked = {name: value for name in _PARAMS if (value := getattr(body, name, None)) is not None}
    limits = [limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None]
    asked["max_tokens"] = min(limits) if limits else default_max_tokens
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    return SamplingParams(**(asked | given))
