"""What `tessera bench offline` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tessera.config import Ranges

PEERS = ("vllm", "hf", "llamacpp")
"""Engines other than ours that can be run beside it."""


@dataclass(frozen=True, kw_only=True)
class OfflineOptions:
    """The work, and who does it besides our backends."""

    preset: str | None = None
    """Comma separated; every subject is started once for all of them. quick: 8 x 64 in x 16 out; rose: 128 x 256 x 64;
    mini: 256 requests, lengths uniform in 100..1024 both ways; single: 1 x 128 x 512; long: 16 x 8192 x 256. Left out:
    quick, or what the three flags below say."""
    num_prompts: int | None = None
    """Prompts of a workload of your own, with --input-len and --output-len."""
    input_len: str | None = None
    """Tokens a prompt: a number, or `100..500` for lengths drawn uniformly."""
    output_len: str | None = None
    """Tokens to generate from each prompt: a number, or `100..500`."""
    temperature: float = 0.6
    """Of the sampling, nothing is truncated; 0 takes the most likely token. The end of a text is ignored."""
    warmup: int = 1
    """Passes of the same work before the clock."""
    peer: str | None = None
    """Comma separated: vllm, hf (transformers), llamacpp; each in a process of its own, with its own defaults. vLLM has
    our --gpu-memory-utilization, so that with 0.45 both are loaded at once and take turns."""
    peer_python: str | None = None
    """Comma separated `vllm=/path/to/python`: the environment that a peer is installed in. Left out: this one."""
    peer_option: str | None = None
    """Comma separated `vllm:gpu_memory_utilization=0.5`: an argument of vllm's LLM, of transformers' from_pretrained
    (or hf:batch_size), of llama.cpp's parameters (or llamacpp:n_parallel); kept in the row. Left out, these two are
    as many texts at once as our engine runs, and llama.cpp's threads as many as there are cores."""
    one_at_a_time: bool = False
    """Load one subject after the other and run all its repeats, in place of all loaded at once and taking turns. A
    drift of the machine then meets them differently."""
    pass_timeout: float = 3600.0
    """Seconds that a start or a pass may take until its subject has failed."""

    RANGES: ClassVar[Ranges] = {
        "num_prompts": (1, 1_000_000),
        "temperature": (0, 100),
        "warmup": (0, 100),
        "pass_timeout": (0.1, 1e6),
    }
