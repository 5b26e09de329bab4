"""Who takes part in the offline benchmark: each of our backends and each peer, as a process that can be started."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from tessera.bench.offline.options import PEERS, OfflineOptions
from tessera.bench.offline.target import Target
from tessera.bench.record import Subject
from tessera.bench.subjects import Wanted, subject_of
from tessera.config import EngineConfig
from tessera.errors import ConfigError
from tessera.model.gguf_file import GGUFFile
from tessera.types import EngineInfo

MODULES = {"vllm": "vllm", "hf": "transformers", "llamacpp": "llama_cpp"}
PIP = {"vllm": "pip install vllm", "hf": "pip install transformers", "llamacpp": "pip install llama-cpp-python"}
_FOLDER = Path(__file__).parent / "peers"
OPTIONS_OF_OURS = ("model", "dtype", "device", "max_model_len", "load_format", "seed", "cpu_threads")


@dataclass(frozen=True)
class Entrant:
    """One that takes part, not yet started."""

    subject: Subject
    command: list[str]
    settings: Callable[[Path], dict[str, Any]]
    """What its worker is to load; may write the model into the folder given."""
    reasons: list[str]
    """Why it cannot take part."""
    started: Callable[[Subject, dict[str, Any]], Subject]
    """The subject with what its worker answered to that."""


def ours(wanted: Wanted, config: EngineConfig) -> Entrant:
    """A backend of ours; its proof comes with the start."""
    flat = {name: value for section in asdict(config).values() for name, value in section.items()}
    settings = flat | wanted.settings
    return Entrant(
        wanted.subject,
        [sys.executable, "-m", "tessera.bench.offline.worker"],
        lambda _scratch: settings,
        wanted.reasons,
        lambda _subject, answer: subject_of(wanted, msgspec.convert(answer["info"], EngineInfo)),
    )


def peers(options: OfflineOptions, target: Target, config: EngineConfig) -> list[Entrant]:
    """Those that --peer names; ConfigError for an unknown one, or for an option or a python of one that is not."""
    named = [word.strip() for word in options.peer.split(",")] if options.peer is not None else []
    for name in named:
        if name not in PEERS or named.count(name) > 1:
            what = "is named twice" if name in PEERS else "is none that is known"
            raise ConfigError(f"--peer {name!r} {what}", f"use --peer {','.join(PEERS)}, or some of them")
    pythons = _pythons(options.peer_python, named)
    given = _peer_options(options.peer_option, named)
    return [_peer(name, pythons.get(name, sys.executable), given[name], target, config) for name in named]


def _peer(name: str, python: str, options: dict[str, Any], target: Target, config: EngineConfig) -> Entrant:
    note = "not proven: another engine"
    return Entrant(
        Subject(name, engine=name, note=note),
        [python, str(_FOLDER / "serve.py"), str(_FOLDER / f"{name}.py")],
        partial(_peer_settings, name, options, target, config),
        _reasons_against(name, python, target),
        lambda subject, answer: replace(subject, note="; ".join(filter(None, (note, answer["note"])))),
    )


def _peer_settings(
    name: str, options: dict[str, Any], target: Target, config: EngineConfig, scratch: Path
) -> dict[str, Any]:
    from tessera.bench.offline.export import folder_of

    model = target.source.path if name == "llamacpp" else folder_of(target.source, target.torch_dtype, scratch)
    return {
        "model": str(model),
        "dtype": target.dtype,
        "device": target.device,
        "load_format": config.model.load_format,
        "max_model_len": config.model.max_model_len,
        "enable_prefix_caching": config.cache.enable_prefix_caching,
        "gpu_memory_utilization": config.cache.gpu_memory_utilization,
        "seed": config.model.seed,
        "file_type": _file_type(target.source.path) if name == "llamacpp" else "",
        "max_num_seqs": config.scheduler.max_num_seqs,
        "cpu_threads": config.device.cpu_threads,
        "options": options,
    }


def _file_type(path: Path) -> str:
    """The type of most weights of a GGUF file, as ggml writes it: Q4_K."""
    weights: Counter[str] = Counter()
    for tensor in GGUFFile(path).tensors.values():
        weights[tensor.type_name] += math.prod(tensor.shape)
    return weights.most_common(1)[0][0]


def _reasons_against(name: str, python: str, target: Target) -> list[str]:
    """What can be known without loading: whether it is installed, and reads such a file."""
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({MODULES[name]!r}) is None)"
    try:
        missing = subprocess.run([python, "-c", find], capture_output=True, timeout=60).returncode != 0
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{python} cannot be run: {error}", f"mend --peer-python {name}=PYTHON") from None
    if missing:
        return [f"{MODULES[name]} is not installed for {python}; {PIP[name]}, or --peer-python {name}=PYTHON"]
    if name == "llamacpp" and target.source.kind != "gguf":
        return [f"llama.cpp reads .gguf files, {target.name} is a folder"]
    return []


def _pythons(text: str | None, named: Sequence[str]) -> dict[str, str]:
    found = {}
    for word in _words(text):
        name, equals, path = word.partition("=")
        if not equals or not path:
            raise ConfigError(f"--peer-python {word!r} is not of the form PEER=PYTHON", "use vllm=/path/to/bin/python")
        _check_named("--peer-python", name, named)
        found[name] = path
    return found


def _peer_options(text: str | None, named: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {name: {} for name in named}
    for word in _words(text):
        name, colon, rest = word.partition(":")
        option, equals, value = rest.partition("=")
        if not (colon and option and equals):
            raise ConfigError(
                f"--peer-option {word!r} is not of the form PEER:NAME=VALUE", "use vllm:gpu_memory_utilization=0.5"
            )
        _check_named("--peer-option", name, named)
        if option in OPTIONS_OF_OURS and name != "llamacpp":
            raise ConfigError(f"--peer-option {word} would change the comparison", "give it for all: see the flags")
        found[name][option] = _value(value)
    return found


def _words(text: str | None) -> list[str]:
    return [] if text is None else [word.strip() for word in text.split(",")]


def _check_named(flag: str, name: str, named: Sequence[str]) -> None:
    if name not in named:
        raise ConfigError(f"{flag} is for {name!r}, which does not take part", f"add --peer {name}, or leave it out")


def _value(text: str) -> Any:
    """`0.5`, `true` and `null` as JSON has them; anything else is text."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
