"""What waits for the API process is taken together, and nothing a client reads depends on how much that is."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec
import pytest

from tessera.config import EngineConfig, ModelConfig, ServerConfig
from tessera.errors import EngineDeadError
from tessera.model.source import find_model
from tessera.server import ipc
from tessera.server.engine_client import MIN_WORK_SECONDS, WOKEN_AT_ONCE, EngineClient
from tessera.server.errors import TooManyRequestsError
from tessera.server.events import EventStream, unless_disconnected
from tessera.server.generation import Generation, Prompt
from tessera.server.output_stream import MAX_TAKEN, OutputStream
from tessera.text.request_text import RequestText
from tessera.text.tokenizer import Tokenizer, load_tokenizer
from tessera.types import EngineStatus, Output, Request, SamplingParams

Test = Callable[[EngineClient, Tokenizer, list[ipc.ToEngine]], Coroutine[Any, Any, None]]


def with_client(test: Test, max_queued_requests: int = 4) -> None:
    """Run `test` with a client that has no engine process, and what is sent to it."""

    async def run() -> None:
        client = EngineClient(EngineConfig(), ServerConfig(max_queued_requests=max_queued_requests))
        sent: list[ipc.ToEngine] = []
        client._socket.send_now = sent.append  # type: ignore[assignment, method-assign]
        try:
            await test(client, load_tokenizer(find_model(ModelConfig()), ModelConfig()), sent)
        finally:
            await client.stop()

    asyncio.run(run())


def generation_of(client: EngineClient, tokenizer: Tokenizer, **params: Any) -> Generation:
    request = Request("r", [1], SamplingParams(max_tokens=5000, **params))
    return Generation(client, [Prompt([1])], [RequestText(request, tokenizer, None)])


def report(client: EngineClient, *outputs: Output) -> None:
    for stream in client._take(ipc.Report(EngineStatus(), list(outputs))):
        stream.wake()


def test_a_stop_string_among_waiting_tokens_ends_the_text_and_tells_the_engine() -> None:
    async def test(client: EngineClient, tokenizer: Tokenizer, sent: list[ipc.ToEngine]) -> None:
        ids = tokenizer.encode("one two three four")
        with generation_of(client, tokenizer, stop=[" three"]) as generation:
            report(client, *[Output("r", 0, [token_id]) for token_id in ids])
            pieces = [piece async for piece in generation.pieces()]
            assert [(piece.text, piece.finish_reason, piece.stop_reason) for piece in pieces] == [
                ("one two", "stop", " three")
            ]
            assert generation.usage().completion_tokens == 3
            assert sent[1:] == [ipc.Abort("r", 0)]
        assert client.num_unfinished == 0

    with_client(test)


def test_a_request_that_the_engine_gives_up_shows_what_came_before() -> None:
    async def test(client: EngineClient, tokenizer: Tokenizer, sent: list[ipc.ToEngine]) -> None:
        with generation_of(client, tokenizer, n=2) as generation:
            report(client, Output("r", 0, tokenizer.encode("a b")), Output("r", 0, [], finish_reason="abort"))
            report(client, Output("r", 1, tokenizer.encode("c")))
            pieces = generation.pieces()
            found = [await anext(pieces), await anext(pieces)]
            assert [(piece.choice, piece.text) for piece in found] == [(0, "a b"), (1, "c")]
            with pytest.raises(EngineDeadError, match="gave the request up"):
                await anext(pieces)
        assert client.num_unfinished == 0
        assert sent[1:] == [ipc.Abort("r")]

    with_client(test)


def test_the_queue_counts_sequences_until_they_finish_or_are_left() -> None:
    async def test(client: EngineClient, tokenizer: Tokenizer, _: list[ipc.ToEngine]) -> None:
        with generation_of(client, tokenizer, n=3) as generation:
            with pytest.raises(TooManyRequestsError, match="3 sequences"):
                client.admit(2)
            report(client, Output("r", 1, [5], finish_reason="length"))
            assert (await anext(generation.pieces())).finish_reason == "length"
            client.admit(2)
        assert client.num_unfinished == 0
        client.admit(4)

    with_client(test)


def test_a_long_queue_is_taken_in_parts_and_others_have_a_turn() -> None:
    async def test(client: EngineClient, tokenizer: Tokenizer, _: list[ipc.ToEngine]) -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        with generation_of(client, tokenizer) as generation:
            count = 3 * MAX_TAKEN
            report(client, *[Output("r", 0, [500], finish_reason=None) for _ in range(count - 1)])
            report(client, Output("r", 0, [500], finish_reason="length"))
            task = asyncio.create_task(other())
            sizes = [len(piece.token_ids) async for piece in generation.pieces()]
            task.cancel()
        assert sizes == [MAX_TAKEN] * 3
        assert turns >= 2

    with_client(test)


@pytest.mark.parametrize(("num_steps", "rests"), [(1, False), (2, True)])
def test_only_a_process_that_is_behind_rests_between_its_chunks(num_steps: int, rests: bool) -> None:
    """What keeps up with the engine gives out each token at once."""
    work = MIN_WORK_SECONDS + 0.001

    async def test(client: EngineClient, _: Tokenizer, _sent: list[ipc.ToEngine]) -> None:
        times: list[float] = []

        async def next_messages() -> list[ipc.FromEngine]:
            times.append(time.monotonic())
            if len(times) == 20:
                raise EOFError
            return [ipc.Beat(0.0)] * num_steps

        def take(_message: ipc.FromEngine) -> list[OutputStream]:
            time.sleep(work / num_steps)
            return []

        client._take = take  # type: ignore[assignment, method-assign]
        with pytest.raises(EOFError):
            await client._receive(next_messages)
        shortest = min(b - a for a, b in itertools.pairwise(times))
        assert (shortest > work * 1.9) == rests

    with_client(test)


def test_new_requests_have_a_turn_beside_many_streams_and_first_tokens_are_sent_first() -> None:
    """A request takes several turns of the event loop, which all streams together would keep for milliseconds each."""
    num_streams = 5 * WOKEN_AT_ONCE

    async def test(client: EngineClient, _: Tokenizer, _sent: list[ipc.ToEngine]) -> None:
        names = [str(number) for number in range(num_streams)]
        streams = [client.open([Request(name, [1], SamplingParams(max_tokens=9))]) for name in names]
        report(client, *[Output(name, 0, [5]) for name in names[:-1]])
        for stream in streams[:-1]:
            await stream.take()
        sent: list[str] = []
        seen: list[int] = []

        async def send(name: str, stream: OutputStream) -> None:
            await stream.take()
            sent.append(name)

        async def look() -> None:
            while True:
                seen.append(len(sent))
                await asyncio.sleep(0)

        async def next_messages() -> list[ipc.FromEngine]:
            if seen:
                raise EOFError
            return [ipc.Report(EngineStatus(), [Output(name, 0, [6]) for name in names])]

        tasks = [asyncio.create_task(send(name, stream)) for name, stream in zip(names, streams, strict=True)]
        await asyncio.sleep(0)
        looking = asyncio.create_task(look())
        with pytest.raises(EOFError):
            await client._receive(next_messages)
        await asyncio.gather(*tasks)
        await asyncio.sleep(0)
        looking.cancel()
        assert sent == [names[-1], *names[:-1]]
        assert max(after - before for before, after in itertools.pairwise(seen)) == WOKEN_AT_ONCE

    with_client(test, num_streams)


def test_requests_of_one_turn_go_to_the_engine_in_one_message() -> None:
    async def listen() -> list[list[ipc.ToEngine]]:
        api = ipc.ApiSocket()
        engine = ipc.EngineSocket(api.address)
        try:
            await asyncio.sleep(0.1)
            api.send_now(ipc.Abort("a"))
            api.send_now(ipc.Abort("b", 1))
            await asyncio.sleep(0.1)
            raw = engine._socket.recv()
            api.send_now(ipc.Stop())
            await asyncio.sleep(0.1)
            return [ipc.decode_to_engine(raw), engine.receive(1000)]
        finally:
            engine.close()
            api.close()

    assert asyncio.run(listen()) == [[ipc.Abort("a"), ipc.Abort("b", 1)], [ipc.Stop()]]


class Chunk(msgspec.Struct):
    """What a stream sends here."""

    text: str


def test_chunks_that_are_here_together_are_one_message_the_end_included() -> None:
    async def test(client: EngineClient, tokenizer: Tokenizer, _: list[ipc.ToEngine]) -> None:
        generation = generation_of(client, tokenizer, n=2)
        sent: list[dict[str, Any]] = []

        async def chunks() -> AsyncIterator[Chunk]:
            async for piece in generation.pieces():
                yield Chunk(piece.text)
            yield Chunk("usage")

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 2:
                report(client, *[Output("r", i, tokenizer.encode(f" b{i}"), finish_reason="length") for i in range(2)])

        report(client, *[Output("r", i, tokenizer.encode(f"a{i}")) for i in range(2)])
        await EventStream(generation, chunks())({}, asyncio.Event().wait, send)  # type: ignore[arg-type]
        assert [message.get("body") for message in sent] == [
            None,
            b'data: {"text":"a0"}\n\ndata: {"text":"a1"}\n\n',
            b'data: {"text":" b0"}\n\ndata: {"text":" b1"}\n\ndata: {"text":"usage"}\n\ndata: [DONE]\n\n',
        ]
        assert [message.get("more_body") for message in sent] == [None, True, False]

    with_client(test)


def test_a_piece_that_is_not_told_keeps_no_chunk_back() -> None:
    """Of two choices one gives text and the other, behind it, none: what a stop string or half a character holds."""

    async def test(client: EngineClient, tokenizer: Tokenizer, _: list[ipc.ToEngine]) -> None:
        generation = generation_of(client, tokenizer, n=2)
        sent: list[bytes] = []

        async def chunks() -> AsyncIterator[Chunk]:
            async for piece in generation.pieces():
                if piece.choice == 0 or piece.finish_reason:
                    yield Chunk(piece.text)

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            number = len(sent)
            if number == 5:
                return
            reason: Any = "length" if number == 4 else None
            tokens = [tokenizer.encode(text) for text in (f" b{number}", " c")]
            report(client, *[Output("r", i, ids, finish_reason=reason) for i, ids in enumerate(tokens)])

        await asyncio.wait_for(EventStream(generation, chunks())({}, asyncio.Event().wait, send), 10)  # type: ignore[arg-type]
        assert [body.count(b"data:") for body in sent] == [0, 1, 1, 1, 3]

    with_client(test)


def test_work_ends_when_the_client_goes_away_and_a_cancellation_stays_one() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("work")

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def stays() -> dict[str, str]:
        await asyncio.sleep(60)
        return {}

    async def test() -> None:
        await unless_disconnected(gone, work())
        assert ended == ["work"]
        task = asyncio.create_task(unless_disconnected(stays, work()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["work", "work"]
        assert await unless_disconnected(stays, asyncio.sleep(0, "done")) == "done"

    asyncio.run(test())
