"""vLLM: `LLM.generate` on prompts of token ids; nothing is tokenised or detokenised.

It has its own defaults but for what is asked of all: lengths, prefix cache, share of the GPU's memory.
"""

from __future__ import annotations

import os
import subprocess
import time
from importlib import import_module
from typing import Any

Ids = list[list[int]]


class Worker:
    """vLLM's offline engine; run by serve.py."""

    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Weights from a folder, or random ones of its config.json (`load_format="dummy"`)."""
        vllm: Any = import_module("vllm")
        self.sampling_params = vllm.SamplingParams
        self.gpu_before = _gpu_used_bytes()
        given = {
            "model": settings["model"],
            "dtype": settings["dtype"],
            "load_format": settings["load_format"],
            "max_model_len": settings["max_model_len"],
            "enable_prefix_caching": settings["enable_prefix_caching"],
            "gpu_memory_utilization": settings["gpu_memory_utilization"],
            "seed": settings["seed"],
            "skip_tokenizer_init": True,
        } | settings["options"]
        self.llm = vllm.LLM(**given)
        shown = {name: value for name, value in given.items() if name != "model"} | _decided(self.llm)
        versions = {"vllm": vllm.__version__, "torch": import_module("torch").__version__}
        return {"versions": versions, "settings": shown, "note": ""}

    def run(self, prompts: Ids, output_lens: list[int], temperature: float) -> dict[str, Any]:
        """All prompts in one call. Its defaults keep no times of single requests, so there are none."""
        params = [
            self.sampling_params(temperature=temperature, ignore_eos=True, max_tokens=length, detokenize=False)
            for length in output_lens
        ]
        texts = [{"prompt_token_ids": prompt} for prompt in prompts]
        started = time.perf_counter()
        results = self.llm.generate(texts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "prompt_tokens": sum(len(result.prompt_token_ids) for result in results),
            "output_ids": [list(result.outputs[0].token_ids) for result in results],
        }

    def memory(self) -> dict[str, int]:
        """The engine is a process of its own: what the GPU holds more than before it was loaded."""
        peak: dict[str, int] = {"host": import_module("tessera_peer").host_peak_bytes()}
        used = _gpu_used_bytes()
        if used is not None and self.gpu_before is not None:
            peak["gpu"] = used - self.gpu_before
        return peak


def _decided(llm: Any) -> dict[str, Any]:
    """What its defaults came to, as far as its version says so."""
    config = llm.llm_engine.vllm_config
    found = {
        "max_num_seqs": getattr(config.scheduler_config, "max_num_seqs", None),
        "max_num_batched_tokens": getattr(config.scheduler_config, "max_num_batched_tokens", None),
        "async_scheduling": getattr(config.scheduler_config, "async_scheduling", None),
        "num_gpu_blocks": getattr(config.cache_config, "num_gpu_blocks", None),
        "block_size": getattr(config.cache_config, "block_size", None),
        "compilation": getattr(getattr(config.compilation_config, "mode", None), "name", None),
        "cudagraph_mode": getattr(getattr(config.compilation_config, "cudagraph_mode", None), "name", None),
    }
    return {name: value for name, value in found.items() if value is not None}


def _gpu_used_bytes() -> int | None:
    """Of the first visible GPU, asked of the driver: torch asked in this process would set up CUDA in it."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = ["nvidia-smi", f"--id={first}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return int(done.stdout.splitlines()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
