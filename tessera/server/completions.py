"""POST /v1/completions: prompts as text or token ids, continued."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
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
from tessera.server.logprobs import CompletionLogprobsWriter, prompt_logprobs, prompt_logprobs_bytes
from tessera.server.replies import Completion, CompletionChoice, CompletionLogprobs
from tessera.server.schema import MAX_PROMPTS, NUM_DEFAULT_TOKENS, CompletionBody, parse_body, sampling_params
from tessera.server.service import Service, read_body
from tessera.types import Request, SamplingParams

Job = tuple[CompletionBody, list[Prompt], list[Request]]


async def create_completion(request: HttpRequest) -> Response:
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
    body = parse_body(raw, CompletionBody)
    service.check_model(body.model)
    params = _params(body)
    special = body.add_special_tokens is not False
    prompts = [
        Prompt(service.encode(prompt, add_special_tokens=special), prompt)
        if isinstance(prompt, str)
        else Prompt(prompt)
        for prompt in _listed(body.prompt)
    ]
    check_prompt_logprobs(prompts, params, num_copies=params.n)
    return (
        body,
        prompts,
        make_requests(new_call_id("cmpl"), prompts, params, service.info, max_tokens_given=body.max_tokens_given),
    )


def _params(body: CompletionBody) -> SamplingParams:
    wanted = [num for num in (body.prompt_logprobs, body.logprobs if body.echo else None) if num is not None]
    params = sampling_params(
        body, default_max_tokens=NUM_DEFAULT_TOKENS, prompt_logprobs=max(wanted) if wanted else None
    )
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs are not sent in a stream", "leave stream out", param="prompt_logprobs")
    if body.stream and wanted and params.n > 1:
        raise RequestError(f"a stream with echo and logprobs takes n 1, got {params.n}", "leave stream out", param="n")
    return params


def _listed(prompt: str | list[Any]) -> list[str] | list[list[int]]:
    """The four forms of `prompt` as one list."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt is an empty list", "send a text or token ids", param="prompt")
    try:
        if type(prompt[0]) is int:
            return [msgspec.convert(prompt, list[int])]
        if len(prompt) > MAX_PROMPTS:
            raise RequestError(f"{len(prompt)} prompts are too many, at most {MAX_PROMPTS} are taken", param="prompt")
        if isinstance(prompt[0], str):
            return msgspec.convert(prompt, list[str])
        return msgspec.convert(prompt, list[list[int]])
    except msgspec.ValidationError:
        forms = "a string, a list of strings, a list of token ids or a list of lists of token ids"
        raise RequestError(f"prompt must be {forms}", param="prompt") from None


class _Writer:
    """Renders one completion call."""

    def __init__(self, body: CompletionBody, generation: Generation, service: Service) -> None:
        self._body, self._generation, self._service = body, generation, service
        self._tokenizer = service.tokenizer
        self._usage_wanted, self._usage_always = body.usage_wanted, body.usage_always
        self._id, self._created, self._model = new_call_id("cmpl"), int(time.time()), service.info.model
        num_top = body.logprobs or 0
        self._logprobs = [CompletionLogprobsWriter(service.tokenizer, num_top) for _ in range(generation.num_choices)]

    async def whole(self) -> Completion:
        """The answer in one piece."""
        answers = await self._generation.answers()
        n = self._generation.requests[0].params.n
        choices = []
        for answer in answers:
            answer.prompt_logprobs = answers[answer.choice // n * n].prompt_logprobs
            choices.append(await self._rendered(answer, first=True))
        return Completion(self._id, self._created, self._model, choices, self._generation.usage())

    async def chunks(self) -> AsyncIterator[Completion]:
        """The answer in pieces, then usage where it was asked for."""
        begun: set[int] = set()
        async for piece in self._generation.pieces():
            is_first = piece.choice not in begun
            choice = await self._rendered(piece, first=is_first)
            told = choice.text or choice.logprobs or choice.finish_reason
            # with usage in each chunk, a token whose text is held back counts too
            if told or self._usage_always or is_first:
                begun.add(piece.choice)
                yield self._chunk([choice])
        if self._usage_wanted:
            yield self._chunk([], last=True)

    def _chunk(self, choices: list[CompletionChoice], *, last: bool = False) -> Completion:
        chunk = Completion(self._id, self._created, self._model, choices)
        if self._usage_wanted:
            chunk.usage = self._generation.usage() if last or self._usage_always else None
        return chunk

    async def _rendered(self, piece: Piece, *, first: bool) -> CompletionChoice:
        if piece.prompt_logprobs is None:
            return self._choice(piece, first=first)
        size = prompt_logprobs_bytes(piece.prompt_logprobs)
        return await self._service.prepare(size, lambda: self._choice(piece, first=first))

    def _choice(self, piece: Piece, *, first: bool) -> CompletionChoice:
        choice = CompletionChoice(piece.choice, piece.text, None, piece.finish_reason, piece.stop_reason)
        echoed = self._echo(piece, choice) if first and self._body.echo else None
        if self._body.logprobs is not None:
            new = self._logprobs[piece.choice].write(piece.token_ids, piece.logprobs)
            choice.logprobs = _joined(echoed, new) if echoed else new
        if self._body.prompt_logprobs is not None and piece.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(piece.prompt_logprobs, self._tokenizer, self._body.prompt_logprobs)
        return choice

    def _echo(self, piece: Piece, choice: CompletionChoice) -> CompletionLogprobs | None:
        """Put the prompt before the text; its logprobs where they were asked for."""
        prompt = self._generation.prompt_of(piece.choice)
        text = prompt.text
        if text is None:
            text = self._tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
        choice.text = text + choice.text
        if self._body.logprobs is None or piece.prompt_logprobs is None:
            return None
        return self._logprobs[piece.choice].write(prompt.token_ids, piece.prompt_logprobs)


def _joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )
