"""Settings of `tessera bench kernels`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from tessera.bench.options import RunOptions
from tessera.config import Ranges
from tessera.errors import ConfigError

PresetName = Literal["smoke", "decode", "prefill", "vit"]


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """Which kernels are compared, on what, how often."""

    backends: str = "usable"
    """Comma separated: names that `tessera backends` lists; `PREFILL+DECODE` names one a phase. `usable` stands for all
    that can serve a case here, `all` for all there are, the others as rows that say why not; neither for rungs of the
    ladder."""
    ladder: bool = False
    """Compare naive, the rungs of our own kernels and triton, in the order of their ideas: what each is worth here."""
    profile: bool = False
    """Look into every call, kernel by kernel: device time, shares of both ceilings, registers, spills, shared memory,
    occupancy; hit rates of caches and bank conflicts where Nsight Compute (ncu) is found."""
    preset: PresetName | None = None
    """decode, prefill and vit are the grids of published comparisons, on a CPU in smaller sizes; smoke ends within a
    minute. Left out, with --workloads too: smoke, with --ladder a few sizes of its own."""
    workloads: str | None = None
    """Comma separated batches in vLLM's grammar: groups [COUNT]qNEW[k][sHELD[k]] joined by _, as 2q2k_32q1s4k."""
    phases: str | None = None
    """Comma separated, of prefill, decode, vision: what of the workloads is run. Left out: all of a preset, prefill and
    decode of --workloads. vision runs sequences without a past, seeing both ways."""
    heads: str | None = None
    """Comma separated QUERY/KV/SIZE, as 32/8/128. Left out: those of --model, else the preset's, else those of the
    default model."""
    dtypes: str = "auto"
    """Comma separated, of float32, bfloat16, float16. auto: the one the engine would take."""
    page_size: int | None = None
    """Tokens a page. Left out: 16."""
    window: int | None = None
    """A token sees itself and the N - 1 before it. Left out: as --model says, else all."""
    soft_cap: float | None = None
    """Scores become X * tanh(score / X)."""
    eager: bool = False
    """No CUDA graph, for anyone. Left out: decoding is timed as a graph where the backend allows it, and eagerly too,
    which is what the engine does today."""
    graph: bool = False
    """A CUDA graph for every phase; a backend that allows none is a row that says so."""
    repeats: int = 15
    """Calls that are timed, all backends in turn."""
    seed: int = 0
    """Of queries, keys, values and the order of pages."""
    out: str | None = None
    """File that rows are appended to, as JSON lines. Left out: results/kernels.jsonl."""
    resume: bool = False
    """Leave out what this very command, with this code, has written to --out already."""

    RANGES: ClassVar[Ranges] = {
        "page_size": (1, 4096),
        "window": (1, 2**31),
        "soft_cap": (0.001, 1e6),
        "repeats": (1, 10_000),
        "seed": (0, 2**63 - 1),
    }

    @property
    def mode(self) -> Literal["engine", "eager", "graph"]:
        """How calls are made; ConfigError where two ways are asked for."""
        if self.eager and self.graph:
            raise ConfigError(
                "--eager and --graph exclude each other", "leave one out, or both for either where it fits"
            )
        return "eager" if self.eager else "graph" if self.graph else "engine"

    @property
    def compared(self) -> str:
        """As `--backends`; ConfigError where the ladder is asked for as well as other backends."""
        if self.ladder and self.backends != "usable":
            said = f"--ladder and --backends {self.backends} both say what is compared"
            raise ConfigError(said, "leave one of them out; rungs can be named, as --backends triton:fa1,triton:fa2")
        return self.backends

    @property
    def out_path(self) -> Path:
        """The file for the rows; ConfigError for a name that is no .jsonl file."""
        return RunOptions(out=self.out).out_path("kernels")
