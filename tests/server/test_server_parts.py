"""Parts of the server that need no server to be checked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tessera.config import EngineConfig, ServerConfig
from tessera.errors import ConfigError, RequestError
from tessera.model.source import find_model
from tessera.server import ipc
from tessera.server.engine_client import STEP_PATIENCE, EngineClient
from tessera.server.errors import UnavailableError
from tessera.server.generation import Prompt, open_generation
from tessera.server.run import at_source, bind
from tessera.server.service import Service
from tessera.types import EngineStatus, Request, SamplingParams

NOTHING: Any = None


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
