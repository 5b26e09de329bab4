"""The outputs of one API call, as they come from the engine and as they are taken: all that wait at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from tessera.errors import EngineDeadError, TesseraError
from tessera.text.outputs import joined
from tessera.types import Output, Request

if TYPE_CHECKING:
    from tessera.server.engine_client import EngineClient

MAX_TAKEN = 512
"""Outputs of a stream that are taken at a time: more would keep other streams waiting."""


class OutputStream:
    """The outputs of one or more requests as the engine computes them; leaving it frees what is unfinished."""

    def __init__(self, client: EngineClient, requests: Sequence[Request]) -> None:
        self._client = client
        self._unfinished = {(request.request_id, i) for request in requests for i in range(request.params.n)}
        self._is_single = len(self._unfinished) == 1
        self._waiting: list[Output] = []
        self._failure: TesseraError | None = None
        self._news = asyncio.Event()
        self._opened = time.monotonic()
        self._last_output: dict[tuple[str, int], float] = {}
        self.begun = False
        """Whether outputs have been here before."""
        client.num_unfinished += len(self._unfinished)

    @property
    def finished(self) -> bool:
        """Whether the last output of every sequence has been taken."""
        return not self._unfinished

    def __enter__(self) -> OutputStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.num_unfinished -= len(self._unfinished)
        self._client.latency.finished["abort"] += len(self._unfinished)
        self._client.forget({request_id for request_id, _ in self._unfinished})
        self._unfinished.clear()

    async def take(self) -> list[Output]:
        """What is here, waiting for it, as one Output a sequence; empty once every sequence has finished.

        Raises RequestError where the engine refuses one of the requests and EngineDeadError where it gives one up or
        no more outputs will come.
        """
        if self._waiting:  # the rest of a long queue
            await asyncio.sleep(0)
        while self._unfinished:
            while not self._waiting:
                if self._failure:
                    raise self._failure
                self._news.clear()
                await self._news.wait()
            waiting, self._waiting = self._waiting[:MAX_TAKEN], self._waiting[MAX_TAKEN:]
            if outputs := self._joined(waiting):
                return outputs
        return []

    def _joined(self, waiting: list[Output]) -> list[Output]:
        """`waiting` as one Output a sequence, of those that have not finished."""
        groups: dict[tuple[str, int], list[Output]] = {}
        if self._is_single:
            groups[waiting[0].request_id, waiting[0].index] = waiting
        else:
            for output in waiting:
                groups.setdefault((output.request_id, output.index), []).append(output)
        outputs = []
        for sequence, group in groups.items():
            if sequence not in self._unfinished:
                continue
            if group[-1].finish_reason:
                self._finish(sequence)
            outputs.append(joined(group))
        return outputs

    def stop(self, request_id: str, index: int) -> None:
        """End one sequence early: the engine frees it, and nothing more of it arrives here."""
        if (request_id, index) in self._unfinished:
            self._client.abort(request_id, index)
            self._finish((request_id, index))

    def put(self, output: Output, at: float) -> bool:
        """Hand in an output of `at` (the client's receiver); whether the stream is to be woken for it."""
        if output.finish_reason == "abort":
            self.fail(EngineDeadError("the engine gave the request up"))
            return False
        self._count(output, at)
        self._waiting.append(output)
        return len(self._waiting) == 1

    def _count(self, output: Output, at: float) -> None:
        sequence, num_tokens = (output.request_id, output.index), len(output.token_ids)
        if num_tokens:
            last = self._last_output.get(sequence)
            if last is None:
                self._client.latency.first_token.add(at - self._opened)
            else:
                self._client.latency.inter_token.add((at - last) / num_tokens, num_tokens)
        self._last_output[sequence] = at

    def wake(self) -> None:
        """Let whoever waits for outputs take them."""
        self.begun = True
        self._news.set()

    def fail(self, failure: TesseraError) -> None:
        """End the stream with an error, after the outputs that have already come."""
        self._failure = self._failure or failure
        self._news.set()

    def _finish(self, sequence: tuple[str, int]) -> None:
        self._unfinished.discard(sequence)
        self._client.num_unfinished -= 1
        self._client.latency.sequence.add(self._last_output[sequence] - self._opened)
        if all(request_id != sequence[0] for request_id, _ in self._unfinished):
            self._client.release(sequence[0])
