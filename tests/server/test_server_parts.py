"""Parts of the server that need no server to be checked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tessera.config import EngineConfig, ModelConfig, ServerConfig
from tessera.errors import ConfigError, RequestError
from tessera.model.source import find_model
from tessera.server import ipc
from tessera.server.engine_client import STEP_PATIENCE, EngineClient
from tessera.server.errors import UnavailableError
from tessera.server.generation import Generation, Prompt, open_generation
from tessera.server.run import at_source, bind
from tessera.server.service import Service
from tessera.text.request_text import RequestText
from tessera.text.tokenizer import load_tokenizer
from tessera.types import EngineStatus, Output, Request, SamplingParams

NOTHING: Any = None
TEXT = " a quick brown fox jumps over"


def test_a_second_server_is_refused_the_address_before_the_first_has_loaded() -> None:
    with bind(ServerConfig(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            bind(ServerConfig(port=port))


def test_a_model_that_was_found_is_found_again_where_it_lies_under_its_name() -> None:
    config = EngineConfig()
    source = find_model(config.model)
    assert find_model(at_source(config, source).model) == source


def test_a_full_queue_is_noticed_before_any_text_is_prepared() -> None:
    """Without a tokenizer a text could not be."""

    async def ask() -> None:
        client = EngineClient(EngineConfig(), ServerConfig(max_queued_requests=1))
        requests = [Request(str(i), [1], SamplingParams()) for i in range(2)]
        try:
            with pytest.raises(RequestError, match="2 sequences"):
                await open_generation(Service(client, NOTHING, NOTHING, 1), [Prompt([1])] * 2, requests)
        finally:
            await client.stop()

    asyncio.run(ask())


def test_a_step_that_never_ends_is_a_hung_engine_until_it_does() -> None:
    async def listen() -> None:
        client = EngineClient(EngineConfig(), ServerConfig(engine_timeout=2))
        try:
            client._take(ipc.Beat(2.0 * STEP_PATIENCE))
            client.admit(1)
            client._take(ipc.Beat(2.0 * STEP_PATIENCE + 1))
            with pytest.raises(UnavailableError, match="21 s"):
                client.admit(1)
            client._take(ipc.Report(EngineStatus()))
            client.admit(1)
        finally:
            await client.stop()

    asyncio.run(listen())


def test_tokens_that_wait_together_are_one_piece_a_choice_and_all_are_counted() -> None:
    """What came at different times stays apart."""
    tokenizer = load_tokenizer(find_model(ModelConfig()), ModelConfig())
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)

    async def read() -> list[tuple[int, str, str | None, int]]:
        client = EngineClient(EngineConfig(), ServerConfig())
        requests = [Request(str(i), [1], SamplingParams(max_tokens=100)) for i in range(2)]
        generation = Generation(client, [Prompt([1])] * 2, [RequestText(r, tokenizer, None) for r in requests])
        outputs = [[Output(str(i), 0, [token]) for token in token_ids] for i in range(2)]
        found: list[tuple[int, str, str | None, int]] = []
        try:
            client._take(ipc.Report(EngineStatus(), [outputs[0][0]]))
            client._take(ipc.Report(EngineStatus(), outputs[1]))
            client._take(ipc.Report(EngineStatus(), outputs[0][1:]))
            async for piece in generation.pieces():
                found.append((piece.choice, piece.text, piece.finish_reason, generation.usage().completion_tokens))
                if len(found) == 2:
                    last = [Output(str(i), 0, [token_ids[0]], finish_reason="length") for i in range(2)]
                    client._take(ipc.Report(EngineStatus(), last))
        finally:
            await client.stop()
        return found

    count = 2 * len(token_ids)
    first = tokenizer.decode(token_ids[:1], skip_special_tokens=True)
    assert asyncio.run(read()) == [
        (0, TEXT, None, count),
        (1, TEXT, None, count),
        (0, first, "length", count + 2),
        (1, first, "length", count + 2),
    ]


def test_messages_of_the_engine_that_wait_are_taken_together() -> None:
    async def listen() -> list[int]:
        api = ipc.ApiSocket()
        engine = ipc.EngineSocket(api.address)
        try:
            for running in range(5):
                engine.send(ipc.Report(EngineStatus(running=running)))
            await asyncio.sleep(0.2)
            messages = await api.receive_all()
            return [message.status.running for message in messages if isinstance(message, ipc.Report)]
        finally:
            engine.close()
            api.close()

    assert asyncio.run(listen()) == [0, 1, 2, 3, 4]
