"""`tessera serve`: the address, the two processes, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import uvicorn
from starlette.applications import Starlette

from tessera.config import EngineConfig, ServerConfig
from tessera.errors import ConfigError
from tessera.log import logger
from tessera.model.source import ModelSource, find_model
from tessera.server.app import build_app
from tessera.server.connection import Connection
from tessera.server.engine_client import PROGRAM, EngineClient
from tessera.server.service import Service, max_token_characters
from tessera.text.tokenizer import Tokenizer, load_tokenizer
from tessera.types import EngineInfo

DRAIN_SECONDS = 5.0
"""What runs when the server is told to stop may finish for this long; then it gets an error."""
LINGER_SECONDS = 3.0
"""How long a server whose engine died still answers 503 before it ends."""

BACKLOG = 2048
"""Connections that may wait to be accepted."""

Announce = Callable[[EngineInfo, str], None]


class HttpServer(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def run_server(
    config: EngineConfig,
    server: ServerConfig,
    announce: Announce,
    *,
    log_level: str = "info",
    program: Sequence[str] = PROGRAM,
) -> int:
    """Serve until told to stop; the exit code, 1 when the engine died.

    `announce` is told what is served and where, once requests are taken. Raises ConfigError, before the
    model is looked for, when the address cannot be had, and ModelError when the model cannot.
    """
    with bind(server) as listener:
        if server.api_key is None and server.host not in ("127.0.0.1", "localhost", "::1"):
            logger.warning("%s lets other machines in and no --api-key is set: anybody may use the model", server.host)
        try:
            # fetched once for both processes, and in this thread, which Ctrl-C ends
            source = find_model(config.model)
            make_client = partial(EngineClient, at_source(config, source), server, program=program)
            return asyncio.run(_serve(make_client, source, listener, announce, log_level))
        except (asyncio.CancelledError, KeyboardInterrupt):
            return 130


def bind(server: ServerConfig) -> socket.socket:
    """The server's address, listening: until the model is loaded, connections wait.

    With SO_REUSEADDR, which a restart soon after the last end needs, only listening keeps another server out.
    ConfigError where the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host can be spelt like this
        raise ConfigError(
            f"cannot listen on {server.host} port {server.port}: {getattr(error, 'strerror', None) or error}",
            "use another --port (0 picks a free one) or --host, or stop what listens there",
        ) from None
    return listener


def at_source(config: EngineConfig, source: ModelSource) -> EngineConfig:
    """`config` for a model that has been found, served under the same name."""
    load_format = "dummy" if source.random else config.model.load_format
    model = replace(
        config.model, model=str(source.path), served_model_name=source.name, revision=None, load_format=load_format
    )
    return replace(config, model=model)


async def _serve(
    make_client: Callable[[], EngineClient],
    source: ModelSource,
    listener: socket.socket,
    announce: Announce,
    log_level: str,
) -> int:
    client = make_client()
    main = asyncio.current_task()
    assert main is not None
    _on_signals(lambda: main.cancel())
    try:
        starting = client.start(log_level)
        text_side = asyncio.to_thread(_text_side, source, client.config)
        info, (tokenizer, longest) = await asyncio.gather(starting, text_side)
        app = build_app(Service(client, tokenizer, info, longest), client.server.api_key)
        return await _listen(app, client, listener, lambda url: announce(info, url))
    finally:
        await client.stop()


def _text_side(source: ModelSource, config: EngineConfig) -> tuple[Tokenizer, int]:
    tokenizer = load_tokenizer(source, config.model)
    return tokenizer, max_token_characters(tokenizer)


async def _listen(
    app: Starlette, client: EngineClient, listener: socket.socket, announce: Callable[[str], None]
) -> int:
    http = HttpServer(
        uvicorn.Config(
            app,
            http=Connection,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,  # nothing here asks who the client is
            timeout_graceful_shutdown=round(DRAIN_SECONDS + 2),
        )
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # no HTTP: anybody could fill the log with that
    _on_signals(lambda: _stop(http, client))
    announce(url_of(client.server, listener))
    mourner = asyncio.create_task(_end_after_death(http, client))
    await http.serve(sockets=[listener])
    mourner.cancel()
    return 1 if client.dead.is_set() else 0


def url_of(server: ServerConfig, listener: socket.socket) -> str:
    """The address a client on this machine uses."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(server.host, server.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _on_signals(action: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, action)


def _stop(http: HttpServer, client: EngineClient) -> None:
    """Take no more requests and let the running ones finish for a while; at once when told a second time."""
    wait = 0.0 if http.should_exit else DRAIN_SECONDS
    logger.info("stopping")
    http.should_exit = True
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what is cut off from here on is cut off on purpose
    asyncio.get_running_loop().call_later(wait, client.shut_down)


async def _end_after_death(http: HttpServer, client: EngineClient) -> None:
    await client.dead.wait()
    await asyncio.sleep(LINGER_SECONDS)  # so that whoever probes /health reads why
    http.should_exit = True
