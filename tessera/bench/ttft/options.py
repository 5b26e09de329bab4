"""Settings of `tessera bench ttft`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tessera.bench.options import numbers
from tessera.config import Ranges
from tessera.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TtftOptions:
    """Which prompts, which models, how often."""

    models: str = "default"
    """Comma separated: folders, .gguf files, hub ids, default, and shapes with random weights, which need no download:
    dummy:135m, dummy:360m, dummy:1.7b, dummy:7b and others."""
    prompt_lens: str = "32,128,512"
    """Comma separated: tokens of the prompts."""
    fast: str | None = None
    """Backend of the third and fourth bar, or PREFILL+DECODE. Left out: triton, our Flash-Decoding, where it can serve,
    else auto."""
    requests: int = 5
    """Requests of each bar and length that are timed, one after another; a row has their median."""
    repeats: int = 3
    """Times that each server is started and each bar measured, in alternating order."""
    request_timeout: float = 600.0
    """Seconds after which a request that has not ended counts as failed."""
    out: str | None = None
    """File that rows are appended to, as JSON lines. Left out: results/ttft.jsonl."""
    resume: bool = False
    """Leave out what this very command, with this code, has written to --out already."""

    RANGES: ClassVar[Ranges] = {"requests": (1, 10_000), "repeats": (1, 1000), "request_timeout": (0.01, 86400)}

    @property
    def lengths(self) -> list[int]:
        """The lengths of prompts; ConfigError where one is no number, out of range or given twice."""
        found = [int(number) for number in numbers("--prompt-lens", self.prompt_lens, int, 1, 2**24)]
        if len(set(found)) < len(found):
            raise ConfigError(
                f"--prompt-lens {self.prompt_lens} has a number twice", "give each once; --repeats repeats them all"
            )
        return found

    @property
    def model_names(self) -> list[str]:
        """The models as they were named; ConfigError for an empty name or one given twice."""
        found = [name.strip() for name in self.models.split(",")]
        if "" in found or len(set(found)) < len(found):
            raise ConfigError(f"--models {self.models!r} has an empty name, or one twice", "use --models A,B")
        return found

    def check_context(self, max_model_len: int, model: str) -> None:
        """ConfigError where a prompt and one token are longer than `model` takes."""
        if max(self.lengths) + 1 > max_model_len:
            fits = ",".join(str(length) for length in self.lengths if length < max_model_len) or str(max_model_len - 1)
            raise ConfigError(
                f"a prompt of {max(self.lengths)} tokens and its answer are more than the {max_model_len} of {model}",
                f"use --prompt-lens {fits}",
            )

    def out_path(self) -> Path:
        """The file for the rows; ConfigError for a name that is no .jsonl file."""
        from tessera.bench.options import RunOptions

        return RunOptions(out=self.out).out_path("ttft")
