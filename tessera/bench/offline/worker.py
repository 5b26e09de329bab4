"""The process of our own engine, `python -m tessera.bench.offline.worker`, told what to do as in peers/serve.py."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from tessera.bench.offline.peers.serve import serve, torch_peak_bytes
from tessera.types import Output, Request, SamplingParams


class Worker:
    """The engine on token ids: nothing is tokenised or detokenised, as with the peers."""

    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Start the engine with its proofs; answers its EngineInfo."""
        from tessera.config import EngineConfig
        from tessera.engine.build import build_engine
        from tessera.errors import TesseraError

        try:
            self.engine = build_engine(EngineConfig.from_flat(settings | {"prove_attention": True}))
        except TesseraError as error:
            return {"error": error.message, "no_memory": type(error).__name__ == "CapacityError"}
        return {"info": msgspec.to_builtins(self.engine.info), "settings": {}, "versions": {}, "note": ""}

    def run(self, prompts: list[list[int]], output_lens: list[int], temperature: float) -> dict[str, Any]:
        """All prompts at once; tokens, first-token times and latencies of each as the engine's steps end."""
        from tessera.engine.garbage import keep_what_is_there

        with keep_what_is_there():
            return self._run(prompts, output_lens, temperature)

    def _run(self, prompts: list[list[int]], output_lens: list[int], temperature: float) -> dict[str, Any]:
        before = self.engine.status()
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        outputs: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
        started = time.perf_counter()
        for index, (prompt, length) in enumerate(zip(prompts, output_lens)):
            params = SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=length)
            self.engine.add(Request(str(index), prompt, params))
        while self.engine.has_work:
            made: list[Output] = self.engine.step()
            now = time.perf_counter() - started
            for output in made:
                outputs[output.request_id] += output.token_ids
                first.setdefault(output.request_id, now)
                last[output.request_id] = now
        seconds = time.perf_counter() - started
        after = self.engine.status()
        return {
            "seconds": seconds,
            "prompt_tokens": after.prompt_tokens - before.prompt_tokens,
            "first_token_s": [first[name] for name in outputs],
            "latencies_s": [last[name] for name in outputs],
            "output_ids": list(outputs.values()),
            "counters": {
                "preemptions": after.preemptions - before.preemptions,
                "steps": after.steps - before.steps,
                "cached_prompt_tokens": after.cached_prompt_tokens - before.cached_prompt_tokens,
            },
        }

    def memory(self) -> dict[str, int]:
        """Of this process."""
        return torch_peak_bytes()


if __name__ == "__main__":
    serve(Worker())
