"""A worker process: one engine, loaded once, that runs passes when it is told to, and waits on a pipe in between.

    python serve.py ENGINE.py          ENGINE.py has a class `Worker`

Imports the standard library only, so that it runs in an environment that has a peer and no tessera. Messages are
JSON, one a line: {"op": "load" | "run" | "memory" | "quit", ...} on stdin, one answer each on what was stdout. Whatever
a library prints to stdout goes to stderr instead.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Any, Protocol


class Worker(Protocol):
    """An engine that answers token ids with token ids; what it raises becomes the answer, and it lives on."""

    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Load the model; facts about the engine. ModuleNotFoundError where its library is not installed."""

    def run(self, prompts: list[list[int]], output_lens: list[int], temperature: float) -> dict[str, Any]:
        """One pass: `seconds`, `prompt_tokens` computed, `output_ids` and times where they are known."""

    def memory(self) -> dict[str, int]:
        """Peak bytes so far, by kind: `host`, `gpu`."""


def serve(worker: Worker, requests: int = 0, answers: int | None = None) -> None:
    """Obey messages from the descriptor `requests` until it ends or says quit; without `answers` stdout is taken."""
    if answers is None:
        answers = os.dup(1)
        os.dup2(2, 1)
    with os.fdopen(os.dup(requests)) as lines, os.fdopen(answers, "w") as out:
        for line in lines:
            message = json.loads(line)
            if message["op"] == "quit":
                return
            out.write(json.dumps(_answer(worker, message)) + "\n")
            out.flush()


def _answer(worker: Worker, message: dict[str, Any]) -> dict[str, Any]:
    try:
        if message["op"] == "load":
            return worker.load(message["settings"])
        if message["op"] == "run":
            return worker.run(message["prompts"], message["output_lens"], message["temperature"])
        return {"memory": worker.memory()}
    except ModuleNotFoundError as error:
        return {"unavailable": f"{error.name} is not installed in {sys.executable}"}
    except Exception as error:
        import traceback

        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def host_peak_bytes() -> int:
    """The most memory this process has held in RAM."""
    import resource

    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def cuda_peak_bytes() -> int | None:
    """The most GPU memory that torch has reserved in this process; None where it uses no GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_reserved())


def torch_peak_bytes() -> dict[str, int]:
    """Of an engine that computes with torch in this process."""
    gpu = cuda_peak_bytes()
    return {"host": host_peak_bytes()} | ({} if gpu is None else {"gpu": gpu})


def main() -> None:
    """Entry point of the process."""
    path = os.path.abspath(sys.argv[1])
    here = os.path.dirname(os.path.abspath(__file__))
    # A peer's file has the name of its library, which must not be found in its place, in its own children neither.
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder or ".") not in (here, os.path.dirname(path))]
    sys.modules["tessera_peer"] = sys.modules["__main__"]
    spec = importlib.util.spec_from_file_location("tessera_peer_worker", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tessera_peer_worker"] = module
    spec.loader.exec_module(module)
    serve(module.Worker())


if __name__ == "__main__":
    main()
