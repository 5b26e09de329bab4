"""`tessera serve` over an engine that fails where its prompt says so; no weights, the real tokenizer.

Run with an address as its only argument it is the engine process, else the server.
"""

from __future__ import annotations

import os
import sys
import time

from tessera import cli
from tessera.commands import serve
from tessera.config import EngineConfig, ServerConfig
from tessera.errors import CapacityError, RequestError
from tessera.server import engine_process, run
from tessera.types import AttentionChoice, EngineInfo, EngineStatus, Output, Request

CRASH, REFUSE, SLEEP, EXIT, NONSENSE = 101, 102, 103, 104, 105
"""Prompt tokens that make the engine raise, refuse, step for 3 s, end its process, or say what nobody understands."""


class ScriptedEngine:
    """Repeats each prompt's last token, one a step."""

    def __init__(self) -> None:
        choice = AttentionChoice("decode", "none", "scripted")
        self.info = EngineInfo(
            "scripted", "none", "float32", "cpu", 49152, 2048, [2], 16, 100, 8, 64, [choice], load_seconds=0.0
        )
        self.left: dict[tuple[str, int], tuple[int, int]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.left)

    def add(self, request: Request) -> None:
        token_id = request.prompt_token_ids[-1]
        if token_id == REFUSE:
            raise RequestError("the script refuses this", "send another", param="prompt")
        if request.params.stop:
            raise RequestError("stop strings are none of the engine's business", param="stop")
        for index in range(request.params.n):
            self.left[request.request_id, index] = (token_id, request.params.max_tokens or 100)

    def abort(self, request_id: str, index: int | None = None) -> None:
        for key in [key for key in self.left if key[0] == request_id and index in (None, key[1])]:
            del self.left[key]

    def step(self) -> list[Output]:
        time.sleep(0.02)
        outputs = []
        for key, (token_id, left) in list(self.left.items()):
            if token_id == CRASH:
                raise RuntimeError("the script crashes here")
            if token_id == EXIT:
                os._exit(7)
            if token_id == SLEEP:
                time.sleep(3)
            if token_id == NONSENSE:
                outputs.append(Output(key[0], "x", []))  # type: ignore[arg-type]
            outputs.append(Output(*key, [token_id], finish_reason="length" if left == 1 else None))
            self.left[key] = (token_id, left - 1)
            if left == 1:
                del self.left[key]
        return outputs

    def status(self) -> EngineStatus:
        return EngineStatus(running=len(self.left), pages_total=100, pages_free=100 - len(self.left))


def build(config: EngineConfig) -> ScriptedEngine:
    if config.model.seed == 13:
        raise CapacityError("the script has no room", "use another --seed")
    if config.model.seed == 14:
        os._exit(9)
    return ScriptedEngine()


def run_server(config: EngineConfig, server: ServerConfig, announce: run.Announce, *, log_level: str) -> int:
    return real_run_server(
        config, server, announce, log_level=log_level, program=(sys.executable, os.path.abspath(__file__))
    )


real_run_server = run.run_server

if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("ipc://"):
        engine_process.build = build
        engine_process.main()
    run.run_server = run_server  # type: ignore[assignment]
    assert serve
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
