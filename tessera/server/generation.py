"""One API call in flight: prompts in, text of numbered choices out, tokens counted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import msgspec

from tessera.engine.check import check_max_tokens, check_request
from tessera.errors import RequestError
from tessera.server.engine_client import EngineClient
from tessera.server.replies import PromptTokensDetails, Usage
from tessera.server.service import Service
from tessera.text.request_text import RequestText
from tessera.types import EngineInfo, FinishReason, Output, Request, SamplingParams, TokenLogprobs

MAX_PROMPT_LOGPROBS = 2**18
"""Most entries that the prompt logprobs of one call may have: tokens times the entries of each."""


@dataclass(frozen=True)
class Prompt:
    """What a choice continues; `text` is None where the client sent token ids."""

    token_ids: list[int]
    text: str | None = None


class Piece(msgspec.Struct, gc=False):
    """Some text of one choice, with what is known about its tokens; the whole answer is a piece too."""

    choice: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def append(self, later: Piece) -> None:
        """Take in the piece that follows this one."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt_logprobs = self.prompt_logprobs or later.prompt_logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


def make_requests(
    call_id: str, prompts: Sequence[Prompt], params: SamplingParams, info: EngineInfo, *, max_tokens_given: bool
) -> list[Request]:
    """One checked request a prompt; RequestError for the first that cannot be served.

    `params.max_tokens` must fit into the context where `max_tokens_given` by the client; a default need not.
    """
    requests = [Request(f"{call_id}-{i}", prompt.token_ids, params) for i, prompt in enumerate(prompts)]
    for request in requests:
        check_request(request, info)
        if max_tokens_given:
            check_max_tokens(request, info)
    return requests


def check_prompt_logprobs(prompts: Sequence[Prompt], params: SamplingParams, *, num_copies: int = 1) -> None:
    """Raise RequestError where the prompt logprobs of a call, told `num_copies` times, would be too many."""
    if params.prompt_logprobs is None:
        return
    num_tokens = num_copies * sum(len(prompt.token_ids) for prompt in prompts)
    if num_tokens * (1 + params.prompt_logprobs) > MAX_PROMPT_LOGPROBS:
        raise RequestError(
            f"prompt_logprobs {params.prompt_logprobs} (or echo with logprobs) for {num_tokens} prompt tokens makes "
            f"{num_tokens * (1 + params.prompt_logprobs)} entries, at most {MAX_PROMPT_LOGPROBS} are sent",
            "send fewer prompts a call or ask for fewer logprobs",
            "prompt_logprobs",
        )


async def open_generation(service: Service, prompts: Sequence[Prompt], requests: Sequence[Request]) -> Generation:
    """Send an API call's requests to the engine; raises what `EngineClient.admit` does, before it prepares any."""
    service.client.admit(sum(request.params.n for request in requests))

    def prepare() -> list[RequestText]:
        return [RequestText(r, service.tokenizer, p.text) for p, r in zip(prompts, requests, strict=True)]

    num_characters = len(requests) * sum(len(text) for text in requests[0].params.stop)
    return Generation(service.client, prompts, await service.prepare(num_characters, prepare))


def new_call_id(prefix: str) -> str:
    """An id that no other call has; it is no secret."""
    return f"{prefix}-{random.getrandbits(96):024x}"


class Generation:
    """The requests of one API call; leaving it frees everything in the engine that has not finished.

    Choices are numbered over prompts and their `n` sequences: prompt 0's first.
    """

    def __init__(self, client: EngineClient, prompts: Sequence[Prompt], texts: Sequence[RequestText]) -> None:
        self.prompts, self.requests = prompts, [text.request for text in texts]
        self._texts = {text.request.request_id: text for text in texts}
        self._places = {request.request_id: i for i, request in enumerate(self.requests)}
        self._num_prompt_tokens = sum([len(prompt.token_ids) for prompt in prompts])
        self.before_waiting: Callable[[], Awaitable[None]] | None = None
        """Called by `pieces` when all that is here has been given out and more is to come, perhaps long after."""
        self._finished = client.latency.finished
        self._stream = client.open(_without_stops(self.requests))

    @property
    def num_choices(self) -> int:
        """Texts this call generates."""
        return sum(request.params.n for request in self.requests)

    def prompt_of(self, choice: int) -> Prompt:
        """The prompt that a choice continues."""
        return self.prompts[choice // self.requests[0].params.n]

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.__exit__(kind, error, at)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text as it comes, of all choices mixed; the last piece of each has a finish_reason.

        Tokens of a choice that wait together are one piece: so a server that is behind its engine catches up.
        """
        while True:
            if self.before_waiting is not None and not self._stream.finished:
                await self.before_waiting()
            outputs = await self._stream.take()
            if not outputs:
                return
            for piece in [self._take(output) for output in outputs]:
                yield piece

    def _take(self, output: Output) -> Piece:
        place = self._places[output.request_id]
        delta = self._texts[output.request_id].feed(output)
        if delta.abort:
            self._stream.stop(output.request_id, output.index)
        if delta.finish_reason:
            self._finished[delta.finish_reason] += 1
        return Piece(
            place * self.requests[place].params.n + output.index,
            delta.text,
            delta.token_ids,
            delta.logprobs or [],
            delta.prompt_logprobs,
            delta.finish_reason,
            delta.stop_reason,
        )

    async def answers(self) -> list[Piece]:
        """The whole text of every choice, in order."""
        answers = [Piece(choice) for choice in range(self.num_choices)]
        async for piece in self.pieces():
            answers[piece.choice].append(piece)
            await asyncio.sleep(0)  # a thousand outputs may be waiting: let other calls in between
        return answers

    def usage(self) -> Usage:
        """Tokens so far."""
        num_prompt = self._num_prompt_tokens
        num_completion = sum([text.num_output_tokens for text in self._texts.values()])
        cached = PromptTokensDetails(sum([text.num_cached_tokens for text in self._texts.values()]))
        return Usage(num_prompt, num_completion, num_prompt + num_completion, cached)


def _without_stops(requests: Sequence[Request]) -> Sequence[Request]:
    """The requests of one call as the engine gets them, which knows no text: stop strings are found here."""
    params = requests[0].params
    if not params.stop:
        return requests
    params = replace(params, stop=[])
    return [replace(request, params=params) for request in requests]
