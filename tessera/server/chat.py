"""POST /v1/chat/completions: a conversation through the model's own template, answered."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tessera.errors import RequestError
from tessera.server.errors import client_gone, json_response
from tessera.server.events import EventStream, unless_disconnected
from tessera.server.generation import (
    Generation,
    Piece,
    Prompt,
    check_prompt_logprobs,
    make_requests,
    new_call_id,
    open_generation,
)
from tessera.server.logprobs import chat_logprobs, prompt_logprobs, prompt_logprobs_bytes
from tessera.server.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Delta,
)
from tessera.server.schema import ChatBody, ContentPart, Message, parse_body, sampling_params
from tessera.server.service import Service, read_body
from tessera.types import Request, SamplingParams

Job = tuple[ChatBody, list[Prompt], list[Request]]


async def create_chat_completion(request: HttpRequest) -> Response:
    """The route."""
    service: Service = request.app.state.service
    raw = await read_body(request)
    body, prompts, requests = await service.prepare(len(raw), lambda: _prepare(raw, service))
    generation = await open_generation(service, prompts, requests)
    writer = _Writer(body, generation, service)
    if body.stream:
        return EventStream(generation, writer.chunks())
    with generation:
        answer = await unless_disconnected(request.receive, writer.whole())
    return client_gone() if answer is None else json_response(answer)


def _prepare(raw: bytes, service: Service) -> Job:
    body = parse_body(raw, ChatBody)
    service.check_model(body.model)
    params = _params(body)
    text = render(service, body.messages, add_generation_prompt=body.add_generation_prompt is not False)
    try:
        # the template has already written the special tokens
        prompt = Prompt(service.encode(text, add_special_tokens=body.add_special_tokens is True), text)
        check_prompt_logprobs([prompt], params)
        return (
            body,
            [prompt],
            make_requests(
                new_call_id("chatcmpl"), [prompt], params, service.info, max_tokens_given=body.max_tokens_given
            ),
        )
    except RequestError as error:
        error.param = "messages" if error.param == "prompt" else error.param
        raise


def _params(body: ChatBody) -> SamplingParams:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs are not sent in a stream", "leave stream out", param="prompt_logprobs")
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    try:
        return sampling_params(body, default_max_tokens=None, logprobs=num_top)
    except RequestError as error:
        error.param = "top_logprobs" if error.param == "logprobs" else error.param
        raise


def render(service: Service, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The conversation as the model's template writes it; RequestError when it cannot."""
    if not messages:
        raise RequestError("messages is empty", "send at least one message", param="messages")
    size = sum(len(_text_of(message, i)) for i, message in enumerate(messages))
    if size > service.max_prompt_characters:
        raise RequestError(
            f"the messages have {size} characters, and {service.max_prompt_characters} is the most that could fit "
            f"into the context of {service.info.max_model_len} tokens",
            param="messages",
        )
    turns = [_turn(message, i) for i, message in enumerate(messages)]
    return service.tokenizer.render_chat(turns, add_generation_prompt=add_generation_prompt)


def _turn(message: Message, i: int) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role  # OpenAI's newer name for the same
    turn = {"role": role, "content": _text_of(message, i)}
    return turn | {"name": message.name} if message.name is not None else turn


def _text_of(message: Message, i: int) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        raise RequestError(f"messages[{i}] has no content", "give a text", param=f"messages[{i}].content")
    return "\n".join(_text_part(part, f"messages[{i}].content[{j}]") for j, part in enumerate(message.content))


def _text_part(part: ContentPart, at: str) -> str:
    if part.type != "text":
        raise RequestError(f"{at} is of type {part.type!r:.60}, only text is taken", "send text parts alone", param=at)
    if part.text is None:
        raise RequestError(f"{at} has no text", "put it in the field 'text'", param=at)
    return part.text


class _Writer:
    """Renders one chat call."""

    def __init__(self, body: ChatBody, generation: Generation, service: Service) -> None:
        self._body, self._generation, self._service = body, generation, service
        self._tokenizer = service.tokenizer
        self._id, self._created, self._model = new_call_id("chatcmpl"), int(time.time()), service.info.model

    async def whole(self) -> ChatCompletion:
        """The answer in one piece."""
        answers = await self._generation.answers()
        choices = [
            ChatChoice(
                answer.choice,
                ChatMessage(answer.text),
                self._logprobs(answer),
                answer.finish_reason,
                answer.stop_reason,
            )
            for answer in answers
        ]
        chat = ChatCompletion(self._id, self._created, self._model, choices, self._generation.usage())
        if (num_top := self._body.prompt_logprobs) is not None:
            entries = answers[0].prompt_logprobs or []
            chat.prompt_logprobs = await self._service.prepare(
                prompt_logprobs_bytes(entries), lambda: prompt_logprobs(entries, self._tokenizer, num_top)
            )
        return chat

    async def chunks(self) -> AsyncIterator[ChatChunk]:
        """First each choice's role, then text as it comes, each choice's end, and usage where asked for."""
        for choice in range(self._generation.num_choices):
            yield self._chunk(ChatChunkChoice(choice, Delta("assistant", "")))
        async for piece in self._generation.pieces():
            logprobs = self._logprobs(piece)
            counted = self._body.usage_always and not piece.finish_reason  # a token whose text is held back counts too
            if piece.text or (logprobs and logprobs.content) or counted:
                yield self._chunk(ChatChunkChoice(piece.choice, Delta(content=piece.text), logprobs))
            if piece.finish_reason:
                end = ChatChunkChoice(piece.choice, Delta(), None, piece.finish_reason, piece.stop_reason)
                yield self._chunk(end)
        if self._body.usage_wanted:
            yield ChatChunk(self._id, self._created, self._model, [], self._generation.usage())

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        chunk = ChatChunk(self._id, self._created, self._model, [choice])
        if self._body.usage_wanted:
            chunk.usage = self._generation.usage() if self._body.usage_always else None
        return chunk

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(piece.logprobs, self._tokenizer, self._body.top_logprobs or 0)
