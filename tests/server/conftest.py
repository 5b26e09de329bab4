"""Servers for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from server_process import SCRIPTED, SERVE, ServerProcess


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """The default model, shared by every test that leaves it as it was.

    In float32, for answers are compared whatever is computed beside them: in bfloat16 that may tip a token.
    """
    limits = ("--max-model-len", "2048", "--num-pages", "600", "--max-queued-requests", "64")
    running = ServerProcess((*SERVE, *limits, "--cpu-threads", "1", "--dtype", "float32"))
    yield running
    assert running.stop() == 0, "".join(running.lines)


@pytest.fixture
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers that the test may break."""
    started: list[ServerProcess] = []

    def start(*flags: str, scripted: bool = False, environment: dict[str, str] | None = None) -> ServerProcess:
        folder = {"TMPDIR": str(tmp_path_factory.mktemp("s"))}
        started.append(ServerProcess((*(SCRIPTED if scripted else SERVE), *flags), folder | (environment or {})))
        return started[-1]

    yield start
    for running in started:
        running.process.kill()
        running.http.close()
        running.process.wait()
