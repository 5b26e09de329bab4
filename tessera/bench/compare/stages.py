"""What `tessera bench compare` runs: the benchmarks and their arguments, quick or full, by device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from tessera.bench.subjects import Wanted

Effort = Literal["quick", "full"]
PARTS = ("kernels", "offline", "online", "api", "ttft", "quality")
"""In the order in which they are run."""

_SETTINGS: dict[tuple[str, str], dict[str, str]] = {
    ("quick", "cpu"): {
        "kernels": "--workloads q128,8q1s512 --phases prefill,decode --repeats 5",
        "offline": "--num-prompts 8 --input-len 64 --output-len 12 --repeats 3",
        "online": "--scales 0.5,1 --rate 6 --num-requests 8 --input-len 64 --output-len 8 --repeats 1 --num-warmup 2",
        "api": "--concurrency 1,4 --input-lens 45 --output-len 8 --repeats 1",
        "ttft": "--prompt-lens 64,256 --requests 3 --repeats 1",
        "quality": "--prompts 2 --tokens 8 --windows 2 --window 128",
    },
    ("full", "cpu"): {
        "kernels": "--preset decode --repeats 10",
        "offline": "--num-prompts 32 --input-len 32..256 --output-len 64 --repeats 5",
        "online": "--scales 0.4,0.7,1,1.3,1.6 --rate 1 --num-requests 32 --input-len 128 --output-len 32 --repeats 3",
        "api": "--concurrency 1,2,4,8,16,32 --input-lens 45 --output-len 64 --repeats 3",
        "ttft": "--models default,dummy:360m --prompt-lens 32,128,512 --repeats 5",
        "quality": "--prompts 16 --tokens 64",
    },
    ("quick", "cuda"): {
        "kernels": "--preset smoke --repeats 15",
        "offline": "--preset rose --repeats 5",
        "online": "--scales 0.4,0.7,1,1.3,1.6 --rate 64 --num-requests 128 --input-len 256 --output-len 64 --repeats 3",
        "api": "--concurrency 1,8,32 --input-lens 45,2800 --output-len 128 --repeats 3",
        "ttft": "--prompt-lens 128,1024,4096 --repeats 3",
        "quality": "--prompts 8 --tokens 32",
    },
    ("full", "cuda"): {
        "kernels": "--preset decode --repeats 30",
        "offline": "--preset mini --repeats 5",
        "online": "--scales 0.4,0.6,0.8,1,1.2,1.4,1.6 --rate 64 --num-requests 512 --input-len 256 --output-len 64 "
        "--repeats 5",
        "api": "--concurrency 1,2,4,8,16,32,64 --input-lens 45,2800 --output-len 512 --repeats 3",
        "ttft": "--models default,dummy:1.7b,dummy:7b --prompt-lens 128,1024,4096 --repeats 5",
        "quality": "--prompts 16 --tokens 64",
    },
}
"""Quick ends within four minutes on a CPU with two cores; full is meant for an hour or a night."""
LEFT_OUT: dict[tuple[str, str], dict[str, str]] = {("quick", "cpu"): {"api": "flex"}}
"""Backends that a benchmark does without where none was named: flex compiles anew in every server, for longer than all
others are measured, and online has it."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What is compared, and how thoroughly."""

    backends: str = "all"
    """Comma separated: names that `tessera backends` lists, `PREFILL+DECODE` for a pair, auto; `usable` for all that
    can serve here, `all` for all there are, the others as rows that say why not. On a CPU these two leave out auto and
    torch_sdpa, which there only choose among the others, and a quick api does without flex, which compiles too long."""
    effort: Effort = "quick"
    """quick: minutes on two cores; full: an hour or more."""
    only: str | None = None
    """Comma separated, of kernels, offline, online, api, ttft, quality. Left out: all."""
    folder: str | None = None
    """Folder for rows, logs and the report. Left out: results/ and the time."""
    resume: bool = False
    """Go on with what --folder has: rows that are there are not measured again."""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {}


def without_choosers(wanted: Sequence[Wanted]) -> list[Wanted]:
    """All but `auto`, and `torch_sdpa` where one of its variants can serve: on a CPU they would be measured twice."""
    variants = [each for each in wanted if each.label.startswith("torch_sdpa:") and not each.reasons]
    choosers = ("auto", "torch_sdpa") if variants else ("auto",)
    return [each for each in wanted if each.label not in choosers]


@dataclass(frozen=True)
class Stage:
    """One benchmark as `tessera bench` is called for it."""

    name: str
    arguments: list[str]


def stages(
    options: CompareOptions,
    parts: list[str],
    device_type: str,
    engine: Mapping[str, str | bool],
    folder: str,
    left_out: Mapping[str, str] | None = None,
) -> list[Stage]:
    """The benchmarks named in `parts` with their arguments, each without the backend that `left_out` has for it.

    `engine` are settings of the engine that were given.
    """
    resume = ["--resume"] if options.resume else []
    return [
        Stage(
            name,
            [
                *_backends(name, options.backends.split(","), (left_out or {}).get(name)),
                *_SETTINGS[options.effort, device_type][name].split(),
                *_engine_flags(name, engine),
                *("--out", f"{folder}/{name}.jsonl"),
                *resume,
            ],
        )
        for name in parts
    ]


def _backends(name: str, backends: Sequence[str], left_out: str | None) -> list[str]:
    """As a benchmark is told them: kernels are named one by one, each once, and no choice; bars are not told."""
    if name == "ttft":
        return []
    told = [word for word in backends if word != left_out] or list(backends)
    if name == "kernels":
        words = (word.partition("#")[0] for pair in told for word in pair.split("+"))
        told = list(dict.fromkeys(word for word in words if word != "auto")) or ["usable"]
    return ["--backends", ",".join(told)]


def _engine_flags(name: str, engine: Mapping[str, str | bool]) -> list[str]:
    """The given settings that concern a benchmark, under the name that it has for them."""
    renamed = {"quality": {"dtype": "dtypes"}, "kernels": {"dtype": "dtypes"}, "ttft": {"model": "models"}}.get(
        name, {}
    )
    of_serving = ("tokenizer", "load_format", "max_model_len", "cpu_four_bits")
    unknown = {"kernels": of_serving, "offline": ("tokenizer",)}.get(name, ())
    flags = []
    for setting, value in engine.items():
        flag = renamed.get(setting, setting).replace("_", "-")
        if setting in unknown:
            continue
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", value]
    return flags
