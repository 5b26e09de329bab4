"""What tests of servers share: a fake one of known delays, a model too small to take time, and a server of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from fake_server import Fake, running_fake
from tessera.bench.record import Subject
from tessera.bench.served.servers import Server, ServerProcess
from tessera.bench.served.targets import OwnTarget
from tessera.model import known_shapes

END = 31999
TINY = known_shapes._llama(64, 128, 2, 2, 1, 32000, max_position_embeddings=1024, eos_token_id=END)


@pytest.fixture(scope="session")
def _one_fake() -> Iterator[Fake]:
    with running_fake() as running:
        yield running


@pytest.fixture
def fake(_one_fake: Fake) -> Fake:
    """One for all tests, which has seen nothing yet."""
    _one_fake.forget()
    return _one_fake


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, to be loaded with `--load-format=dummy`; a token is a byte, a message is its text."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY | {"torch_dtype": "float32"}))
    tokenizer = Tokenizer.from_str(known_shapes._tokenizer(END))
    tokenizer.add_special_tokens(["<end>"])
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.fixture(scope="session")
def small(tiny_model: Path) -> tuple[str, ...]:
    """Flags of an engine that starts as fast as one can."""
    size = ("--max-model-len=256", "--num-pages=100", "--cpu-threads=1", "--dtype=float32", "--seed=7")
    return (f"--model={tiny_model}", "--load-format=dummy", *size)


class _Kept(ServerProcess):
    """Stays up when a benchmark has done with it."""

    def stop(self) -> None:
        if getattr(self, "is_over", True):
            super().stop()


@pytest.fixture(scope="session")
def kept_servers() -> Iterator[Callable[[Sequence[str]], ServerProcess]]:
    """A server of ours for these flags, started once for all tests; whoever changes it must start one of his own."""
    started: dict[frozenset[str], _Kept] = {}

    def server_for(flags: Sequence[str]) -> ServerProcess:
        if (key := frozenset(flags)) not in started:
            started[key] = _Kept(flags)
            started[key].is_over = False
        return started[key]

    yield server_for
    for server in started.values():
        server.is_over = True
        for process in server._processes():
            process.kill()
        server.stop()


@pytest.fixture
def keep_servers(
    kept_servers: Callable[[Sequence[str]], ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> list[OwnTarget]:
    """Targets do not start a server where one with their flags is up; those that were started, in order."""
    seen: list[OwnTarget] = []

    def start(self: OwnTarget) -> tuple[Server, Subject]:
        seen.append(self)
        server = kept_servers(self._all_flags)
        return server, server.subject(self.wanted)

    monkeypatch.setattr(OwnTarget, "start", start)
    return seen


@pytest.fixture(scope="session")
def server(small: tuple[str, ...], kept_servers: Callable[[Sequence[str]], ServerProcess]) -> ServerProcess:
    """One of ours, on torch_sdpa, with a prefix cache."""
    return kept_servers([*small, "--prefill-attention=torch_sdpa", "--decode-attention=torch_sdpa"])
