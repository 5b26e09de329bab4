"""The measuring client's HTTP: answers are the same however they arrive, and what is none is told."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from fake_server import Fake
from tessera.bench.served.client import Client
from tessera.bench.served.http import Answer, Connection, Pool
from tessera.bench.served.load import Call
from tessera.bench.served.loop import run

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX: y\r\n\r\n"
BODY = b"4;name=value\r\nWiki\r\nB\r\npedia 0\r\n\r\n\r\n0\r\nTrailer: z\r\n\r\n"
"""Chunks with an extension, with what ends an answer inside, and with a trailer."""


def _fed(pieces: Sequence[bytes]) -> Answer:
    async def feed() -> Answer:
        answer = Answer()
        for at, piece in enumerate(pieces):
            assert not answer.ended_at, "it was not over yet"
            answer.feed(piece, float(at))
        return answer

    return asyncio.run(feed())


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 1000])
def test_an_answer_is_the_same_in_whatever_pieces_it_comes(size: int) -> None:
    whole = CHUNKED + BODY
    answer = _fed([whole[i : i + size] for i in range(0, len(whole), size)])
    assert answer.body == b"Wikipedia 0\r\n\r\n" and answer.ended_at and not answer.error and answer.may_follow
    assert answer.headers == {"transfer-encoding": "chunked", "x": "y"} and answer.status == 200


def test_each_read_keeps_its_time() -> None:
    answer = _fed([CHUNKED, b"2\r\nab\r\n1\r\nc", b"\r\n3\r\nd", b"ef\r\n", b"0\r\n", b"\r\n"])
    assert answer.reads == [(1.0, b"abc"), (2.0, b"d"), (3.0, b"ef")]


def test_an_answer_ends_at_its_length_or_with_its_connection() -> None:
    told = _fed(
        [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 500 Oh\r\ncontent-length: 3\r\nconnection: close\r\n\r\na", b"bc"]
    )
    assert (told.status, told.body, told.may_follow) == (500, b"abc", False) and told.ended_at
    assert _fed([b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"]).may_follow

    async def lost(head: bytes, error: Exception | None) -> str:
        answer = Answer()
        answer.feed(head + b"ab", 0.0)
        answer.lose(error)
        assert answer.ended_at and answer.body
        return answer.error

    assert asyncio.run(lost(b"HTTP/1.1 200 OK\r\n\r\n", None)) == ""
    assert "closed before the end" in asyncio.run(lost(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", None))
    assert "connection broke" in asyncio.run(lost(b"HTTP/1.1 200 OK\r\n\r\n", ConnectionResetError()))


@pytest.mark.parametrize("wrong", [b"SSH-2.0-x\r\n\r\n", CHUNKED + b"-4\r\nabcd", CHUNKED + b"zz\r\n", b"x" * 70_000])
def test_what_is_no_http_is_an_error_in_words(wrong: bytes) -> None:
    answer = _fed([wrong])
    assert answer.error.startswith("the answer is not HTTP as it should be: ") and not answer.may_follow


def test_a_connection_is_used_again_unless_it_was_idle_for_long(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Connection] = []
    original = Connection.connection_made

    def connection_made(self: Connection, transport: asyncio.BaseTransport) -> None:
        made.append(self)
        original(self, transport)

    monkeypatch.setattr(Connection, "connection_made", connection_made)

    def sent() -> int:
        made.clear()
        calls = [Call(i, [1], 2, fields={"seed": i}) for i in range(3)]
        assert not run(Client(fake.url("quick"), "fake", timeout_s=5).closed_loop(calls, 1)).failed
        return len(made)

    assert sent() == 1, "one after another they share it"
    monkeypatch.setattr("tessera.bench.served.http.KEEP_ALIVE_SECONDS", 0.0)
    assert sent() == 4, "and with the one before the clock each has its own"
    fake.record("quick")


def test_https_is_spoken_and_a_stranger_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ssl

    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "k", "-out", "c", "-days", "2"]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*made, *subject], cwd=tmp_path, check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no openssl to make a certificate with")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "c", tmp_path / "k")

    async def asked() -> str:
        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(CHUNKED + BODY)

        server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
        async with server:
            with Pool(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1") as pool:
                connection, answer = await pool.take(), Answer()
                await connection.exchange(pool.get("/models"), answer)
                connection.close()
                return answer.body.decode()

    with pytest.raises(ssl.SSLCertVerificationError):
        run(asked())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "c"))
    assert run(asked()) == "Wikipedia 0\r\n\r\n"
