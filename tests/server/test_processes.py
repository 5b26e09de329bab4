"""How the two processes live and die: no request hangs, no process stays behind."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest

from scripted_server import CRASH, EXIT, NONSENSE, REFUSE, SLEEP
from server_process import SCRIPTED, SERVE, ServerProcess, check_error, wait_for
from tessera.server.run import DRAIN_SECONDS, LINGER_SECONDS

Start = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def scripted() -> Iterator[ServerProcess]:
    """A server for the tests after which it still stands."""
    running = ServerProcess((*SCRIPTED, "--engine-timeout", "1"))
    yield running
    assert running.stop() == 0


def _ask(server: ServerProcess, token_id: int, num_tokens: int = 100, **more: Any) -> httpx2.Response:
    return server.post("/v1/completions", {"prompt": [5, token_id], "max_tokens": num_tokens, **more})


def _last_events(server: ServerProcess, token_id: int) -> list[str]:
    text = _ask(server, token_id, stream=True).text
    return text.strip().split("\n\n")[-2:]


def _gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_request_the_engine_refuses_fails_alone(scripted: ServerProcess) -> None:
    server = scripted
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(_ask, server, 7)
        check_error(_ask(server, REFUSE), 400, param="prompt", words="the script refuses this")
        assert json.loads(_last_events(server, REFUSE)[0].removeprefix("data: "))["error"]["code"] is None
        assert other.result().json()["usage"]["completion_tokens"] == 100
    assert server.http.get("/health").status_code == 200


def test_an_unexpected_error_in_the_engine_ends_everything_audibly(start_server: Start) -> None:
    server = start_server(scripted=True)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        streaming = pool.submit(_last_events, server, 7)
        waiting = pool.submit(_ask, server, 7)
        wait_for(lambda: server.status()["running"] == 2)
        error = check_error(_ask(server, CRASH), 500, words="the script crashes here")
        assert error["code"] == "engine_dead"
        check_error(waiting.result(), 500)
        assert streaming.result()[0].startswith('data: {"error":{') and streaming.result()[1] == "data: [DONE]"
    check_error(server.http.get("/health"), 503, words="the script crashes here")
    check_error(_ask(server, 7), 503)
    assert server.process.wait(LINGER_SECONDS + 5) == 1


def test_an_engine_that_ends_by_itself_is_noticed(start_server: Start) -> None:
    server = start_server(scripted=True)
    check_error(_ask(server, EXIT), 500, words="exit code 7")


def test_a_message_that_nobody_understands_ends_everything_audibly(start_server: Start) -> None:
    server = start_server(scripted=True)
    check_error(_ask(server, NONSENSE), 500, words="reading from the engine failed")
    check_error(server.http.get("/health"), 503, words="reading from the engine failed")
    assert server.process.wait(LINGER_SECONDS + 5) == 1


def test_a_step_longer_than_the_timeout_is_waited_for(scripted: ServerProcess) -> None:
    server = scripted
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(_ask, server, SLEEP, 1)
        while not asked.done():
            assert server.http.get("/health").status_code == 200
            time.sleep(0.2)
        assert asked.result().status_code == 200


def test_stop_strings_stay_out_of_the_engine(scripted: ServerProcess) -> None:
    assert _ask(scripted, 7, 3, stop=["never"]).status_code == 200


def test_a_killed_engine_is_a_503_and_a_failed_request_at_once(start_server: Start) -> None:
    """The default model and the real engine process."""
    server = start_server()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(_ask, server, 7, 2000, ignore_eos=True)
        wait_for(lambda: server.status()["running"] == 1)
        begun = time.monotonic()
        server.engine.kill()
        check_error(running.result(), 500, words="SIGKILL")
        check_error(server.http.get("/health"), 503, words="SIGKILL")
        assert time.monotonic() - begun < 2
    assert server.process.wait(LINGER_SECONDS + 5) == 1
    assert "Traceback" not in "".join(server.lines)


def test_a_stopped_engine_is_a_503_and_comes_back(scripted: ServerProcess) -> None:
    server = scripted
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(_ask, server, 7, 2000)
        wait_for(lambda: server.status()["running"] == 1)
        engine = server.engine
        engine.suspend()
        check_error(running.result(10), 500, words="said nothing")
        begun = time.monotonic()
        check_error(server.http.get("/health"), 503, words="said nothing")
        check_error(_ask(server, 7), 503)
        assert time.monotonic() - begun < 1
        engine.resume()
    wait_for(lambda: server.http.get("/health").status_code == 200)
    assert wait_for(lambda: (s := server.status())["running"] == 0 and s)["pages_free"] == 100


def test_a_stopped_engine_does_not_keep_the_server_from_ending(start_server: Start) -> None:
    server = start_server(scripted=True)
    engine = server.engine
    engine.suspend()
    assert server.stop() == 0
    assert _gone(engine)


def test_the_engine_dies_with_a_killed_server(start_server: Start, tmp_path: Path) -> None:
    """The default model and the real engine process, in the middle of a step."""
    server = start_server(environment={"TMPDIR": str(tmp_path)})
    engine = server.engine
    with socket.create_connection((server.http.base_url.host, server.http.base_url.port or 0)) as client:
        body = b'{"prompt": "a", "max_tokens": 2000, "ignore_eos": true}'
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        wait_for(lambda: server.status()["running"] == 1)
        server.process.kill()
    wait_for(lambda: _gone(engine), 5)
    assert not any(tmp_path.iterdir())


def test_sigterm_and_ctrl_c_end_both_processes_without_a_traceback(start_server: Start, tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        server = start_server(scripted=True, environment={"TMPDIR": str(tmp_path)})
        engine = server.engine
        assert any(tmp_path.iterdir())
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(_ask, server, 7, 50)
            wait_for(lambda: server.status()["running"] == 1)  # noqa: B023
            os.kill(server.process.pid, number)
            assert running.result().json()["usage"]["completion_tokens"] == 50
        assert server.process.wait(10) == 0
        wait_for(lambda: _gone(engine), 5)  # noqa: B023
        assert "Traceback" not in "".join(server.lines)
        assert not any(tmp_path.iterdir())


def test_a_second_ctrl_c_does_not_wait_for_what_runs(start_server: Start) -> None:
    server = start_server(scripted=True)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(_last_events, server, 7)
        wait_for(lambda: server.status()["running"] == 1)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        last = running.result(2)[0]
        assert "shutting down" in last and '"code":"shutting_down"' in last
    assert server.process.wait(3) == 0
    assert "Traceback" not in "".join(server.lines)


def test_a_request_that_arrives_whole_only_after_the_time_to_finish_is_told_of_the_shutdown(
    start_server: Start,
) -> None:
    server = start_server(scripted=True)
    address = urlsplit(server.url)
    body = json.dumps({"prompt": [5, 7], "max_tokens": 100}).encode()
    with socket.create_connection((address.hostname, address.port)) as late:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        late.sendall(head + body[:5])
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(DRAIN_SECONDS + 0.3)
        late.sendall(body[5:])
        late.settimeout(5)
        answer = late.makefile("rb").read()
    assert b" 503 " in answer.split(b"\r\n")[0] and b'"code":"shutting_down"' in answer
    assert server.process.wait(5) == 0


def test_what_keeps_the_engine_from_starting_is_said_in_a_sentence() -> None:
    for seed, words in (("13", "error: the script has no room\n\nhint: use another --seed"), ("14", "exit code 9")):
        script = str(Path(__file__).with_name("scripted_server.py"))
        done = subprocess.run(
            [sys.executable, script, "--port", "0", "--seed", seed], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_a_port_in_use_is_refused_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        begun = time.monotonic()
        done = subprocess.run([*SERVE, "--port", str(port)], capture_output=True, text=True, timeout=60)
        assert time.monotonic() - begun < 10
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"port {port}" in done.stderr and "hint: use another --port" in done.stderr


def test_ctrl_c_while_the_model_is_loaded_leaves_nothing_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*SERVE, "--port", "0"], stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    children = wait_for(lambda: psutil.Process(process.pid).children())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in errors
    wait_for(lambda: all(_gone(child) for child in children))
    assert not any(tmp_path.iterdir()), tempfile.gettempdir()
