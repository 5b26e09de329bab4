"""The key is asked for on every path but /health, whatever the Host header says."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from starlette.routing import Route

from server_process import SCRIPTED, ServerProcess, check_error
from tessera.server.app import build_app
from tessera.server.latency import Latency

KEY = "sesame-öffne"


@pytest.fixture(scope="module")
def locked() -> Iterator[ServerProcess]:
    running = ServerProcess(SCRIPTED, {"TESSERA_API_KEY": KEY})
    yield running
    running.stop()


def _routes() -> list[str]:
    service: Any = SimpleNamespace(client=SimpleNamespace(latency=Latency()))
    return [route.path for route in build_app(service).routes if isinstance(route, Route)]


def test_every_route_but_health_wants_the_key(locked: ServerProcess) -> None:
    paths = [path.replace("{name:path}", "x") for path in _routes()]
    assert len(paths) > 10
    for path in [*paths, "/nothing", "/HEALTH", "/health/"]:
        for method in ("GET", "POST", "OPTIONS", "DELETE"):
            response = locked.http.request(method, path)
            if path == "/health":
                assert response.status_code in (200, 405)
            else:
                assert check_error(response, 401)["code"] == "invalid_api_key", (method, path)


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer wrong", f"bearer {KEY}", KEY, f"Bearer {KEY}x", f"Basic {KEY}"]
)
def test_no_other_header_opens(locked: ServerProcess, value: str) -> None:
    check_error(locked.http.get("/v1/models", headers={b"authorization": value.encode()}), 401)


def _get(server: ServerProcess, path: bytes, host: bytes) -> bytes:
    """The answer to a request that no polite client would send."""
    with socket.create_connection((server.http.base_url.host, server.http.base_url.port or 0)) as client:
        client.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
        return client.makefile("rb").read()


def test_the_path_is_not_taken_from_the_host_header(locked: ServerProcess) -> None:
    """CVE-2026-48746: a URL rebuilt from Host can be made to look like an open path."""
    assert _get(locked, b"/health", b"x").startswith(b"HTTP/1.1 200")
    for host in (b"x/health?", b"127.0.0.1/health#", b"x\\health", b"localhost:80/health"):
        assert _get(locked, b"/v1/models", host).startswith((b"HTTP/1.1 401", b"HTTP/1.1 400")), host


@pytest.mark.parametrize(
    "path", [b"//health", b"/health/../v1/models", b"/health%2f..%2fv1/models", b"/v1/../health", b"/health;/v1/models"]
)
def test_no_spelling_of_a_path_slips_past(locked: ServerProcess, path: bytes) -> None:
    assert _get(locked, path, b"x").startswith(b"HTTP/1.1 401")


def test_the_key_opens_and_a_wrong_one_is_the_clients_typed_error(locked: ServerProcess) -> None:
    assert locked.http.get("/v1/models", headers={b"authorization": f"Bearer {KEY}".encode()}).status_code == 200
    assert locked.http.get("/health").status_code == 200
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_an_empty_key_does_not_open_the_door(start_server: Callable[..., ServerProcess]) -> None:
    with pytest.raises(AssertionError, match="the API key is empty"):
        start_server(scripted=True, environment={"TESSERA_API_KEY": ""})
