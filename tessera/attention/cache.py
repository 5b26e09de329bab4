"""Measurements on disk, under a key that holds everything they depend on.

A file that is missing, damaged or of another key means measuring anew, never an error.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from tessera.attention.contract import Phase, Shape
from tessera.attention.measure import Measured
from tessera.attention.prove import versions_of
from tessera.attention.registry import BACKENDS, Backend, class_of, plug_in_sources, plug_ins
from tessera.attention.step import Bucket
from tessera.folders import cache_folder
from tessera.log import logger

_SOURCES = (
    "attention/measure.py",
    "attention/timing.py",
    "attention/cuda.py",
    "attention/backends/*.py",
    "kernels/*.py",
)
"""Code of ours that decides times, below the package."""


@dataclass(frozen=True)
class _Stored:
    key: dict[str, str]
    measured: Measured


def make_key(phase: Phase, layers: Mapping[Shape, int], buckets: Sequence[Bucket]) -> dict[str, str]:
    """Everything a measurement depends on; imports plug-ins, but no attention library of ours."""
    device_type = next(iter(layers)).device_type
    backends = [backend for name in (*BACKENDS, *plug_ins()) if (backend := class_of(name))]
    packages = [package for backend in backends for package in backend.packages]
    return {
        "code": _code_digest(),
        "phase": str(phase),
        "device": _device(device_type),
        "threads": str(torch.get_num_threads()) if device_type == "cpu" else "",
        "driver": _driver() if device_type == "cuda" else "",
        "cuda": str(torch.version.cuda),
        "versions": str(sorted(versions_of([*packages, "tessera-llm"]).items())),
        "plug_ins": str([*plug_in_sources(), *(_file_digest(b) for b in backends if b.name not in BACKENDS)]),
        "layers": str([(repr(shape), count) for shape, count in layers.items()]),
        "buckets": str([tuple(bucket) for bucket in buckets]),
    }


def read(key: Mapping[str, str]) -> Measured | None:
    """What was measured under this key; None where nothing was or where it cannot be read."""
    path = None
    try:
        path = _path(key)
        stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        if path is not None and os.path.exists(path):  # what is wrong with the folder `write` will say
            logger.warning("the measurement in %s cannot be read and is made anew: %s", path, error)
        return None
    if stored.key != dict(key) or not stored.measured.buckets:
        logger.warning("the measurement in %s is of something else and is made anew", path)
        return None
    return stored.measured


def write(measurements: Iterable[tuple[Mapping[str, str], Measured]]) -> None:
    """Keep measurements, each under its key; where the folder cannot be written, say so once and go on."""
    try:
        for key, measured in measurements:
            path = _path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, delete=False) as file:
                file.write(msgspec.json.format(msgspec.json.encode(_Stored(dict(key), measured)), indent=1))
            os.replace(file.name, path)
    except OSError as error:
        logger.warning("the measurement of attention is not kept, every start measures anew: %s", error)


def _path(key: Mapping[str, str]) -> Path:
    digest = hashlib.sha256(msgspec.json.encode(dict(sorted(key.items())))).hexdigest()
    return cache_folder() / "attention" / f"{digest[:32]}.json"


def _file_digest(backend: Backend) -> str:
    """Of the file that holds a plug-in: while it is being written its version stays."""
    try:
        content = Path(inspect.getfile(backend)).read_bytes()
    except (OSError, TypeError):
        return "no file"
    return hashlib.sha256(content).hexdigest()[:16]


def _code_digest() -> str:
    folder = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(folder.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _device(device_type: str) -> str:
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor())} ({platform.machine()})"


def _driver() -> str:
    """The driver's own line where Linux shows it."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "unknown"
