"""Settings of `tessera bench api`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tessera.bench.options import numbers
from tessera.bench.places import check_ending
from tessera.config import Ranges
from tessera.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ApiOptions:
    """The grid of a sweep, and where its tables go."""

    concurrency: str = "1,2,4,8,16,32"
    """Comma separated: requests that are sent at once; each is answered, then the next level begins."""
    input_lens: str = "45,2800"
    """Comma separated: tokens of each prompt, as the server counts them, a chat template included."""
    output_len: int = 512
    """Tokens asked of each request."""
    same_prompt: bool = False
    """One prompt for all requests of a row, sent once before the clock starts, as in the article: with a prefix cache,
    prompt throughput is then that of the cache."""
    chat: bool = False
    """Send prompts as a user's message to /v1/chat/completions. Left out: to /v1/completions."""
    ignore_eos: bool = True
    """Ask for exactly --output-len tokens. --no-ignore-eos is for servers that refuse the field; answers may then be
    shorter, and the tokens that came are counted."""
    request_timeout: float = 600.0
    """Seconds after which a request that has not ended counts as failed."""
    keep_servers: bool = False
    """Start each server once and keep all of them up to the end, those whose turn it is not idle: much quicker where
    starting takes long. They share the machine's memory, so give each its part by --num-pages or, on a GPU,
    --gpu-memory-utilization. Left out: a server is alone on the machine and started for each repeat."""
    client_processes: int = 0
    """Processes that send the requests together and read the answers. Left out, or 0: by the level, one for every 32
    requests at once, and by the cores, one for every 4; each row says how many."""
    markdown: str | None = None
    """File for the tables as Markdown. Left out: as --out, ending in .md."""
    results: str | None = None
    """File for the tables' figures, .json or .yaml."""

    RANGES: ClassVar[Ranges] = {"output_len": (1, 2**24), "request_timeout": (0.01, 86400), "client_processes": (0, 64)}

    @property
    def levels(self) -> list[int]:
        """The levels of concurrency; ConfigError where one is no number, out of range or given twice, and where there
        are more client processes than requests at the highest, or than cores.
        """
        from tessera.bench.served.processes import check_processes

        found = _distinct("--concurrency", self.concurrency, 4096)
        check_processes(self.client_processes, max(found), "requests at once")
        return found

    @property
    def lengths(self) -> list[int]:
        """The lengths of prompts; ConfigError as for `levels`."""
        return _distinct("--input-lens", self.input_lens, 2**24)

    def check_context(self, max_model_len: int, model: str) -> None:
        """ConfigError where a prompt and its answer are longer than `model` takes."""
        longest = max(self.lengths)
        if longest + self.output_len > max_model_len:
            room = max_model_len - self.output_len
            fits = [str(length) for length in self.lengths if length <= room]
            hint = (
                f"use --input-lens {','.join(fits) or room}" if room > 0 else f"use --output-len {max_model_len // 2}"
            )
            message = f"{longest} tokens in and {self.output_len} out are more than the {max_model_len} of {model}"
            raise ConfigError(message, hint)

    def markdown_path(self, out: Path) -> Path:
        """Where the Markdown goes; ConfigError for a name that is no .md file."""
        path = Path(self.markdown) if self.markdown is not None else out.with_suffix(".md")
        check_ending("--markdown", path, ".md")
        return path

    def results_path(self) -> Path | None:
        """Where the figures go, if anywhere; ConfigError for a name that is neither .json nor .yaml."""
        path = Path(self.results) if self.results is not None else None
        if path is not None:
            check_ending("--results", path, ".json", ".yaml", ".yml")
        return path


def _distinct(flag: str, text: str, high: int) -> list[int]:
    found = [int(number) for number in numbers(flag, text, int, 1, high)]
    if len(set(found)) < len(found):
        raise ConfigError(f"{flag} {text} has a number twice", "give each once; --repeats repeats them all")
    return found
