"""Measurements on disk, under a key that holds everything they depend on.

A file that is missing, damaged or of another key means measuring anew, never an error.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from tessera.attention import tune_store
from tessera.attention.contract import Phase, Shape
from tessera.attention.kept import Shelf, code_digest, machine
from tessera.attention.measure import Measured
from tessera.attention.prove import versions_of
from tessera.attention.registry import BACKENDS, Backend, class_of, plug_in_sources, plug_ins
from tessera.attention.step import Bucket

_SOURCES = (
    "attention/measure.py",
    "attention/timing.py",
    "attention/cuda.py",
    "attention/backends/*.py",
    "kernels/*.py",
)
"""Code of ours that decides times, below the package."""
_SHELF = Shelf(
    "attention",
    Measured,
    "measurement",
    "is made anew",
    "the measurement of attention is not kept, every start measures anew",
)


def make_key(phase: Phase, layers: Mapping[Shape, int], buckets: Sequence[Bucket]) -> dict[str, str]:
    """Everything a measurement depends on; imports plug-ins, but no attention library of ours."""
    device_type = next(iter(layers)).device_type
    backends = [backend for name in (*BACKENDS, *plug_ins()) if (backend := class_of(name))]
    packages = [package for backend in backends for package in backend.packages]
    return machine(device_type) | {
        "code": code_digest(_SOURCES),
        "phase": str(phase),
        "threads": str(torch.get_num_threads()) if device_type == "cpu" else "",
        "versions": str(sorted(versions_of([*packages, "tessera-llm"]).items())),
        "plug_ins": str([*plug_in_sources(), *(_file_digest(b) for b in backends if b.name not in BACKENDS)]),
        "layers": str([(repr(shape), count) for shape, count in layers.items()]),
        "buckets": str([tuple(bucket) for bucket in buckets]),
        "tuned": str([tune_store.tuned(phase, shape) for shape in layers]),
    }


def read(key: Mapping[str, str]) -> Measured | None:
    """What was measured under this key; None where nothing was or where it cannot be read."""
    found = _SHELF.read(key)
    return found if found and found.buckets else None


def write(measurements: Iterable[tuple[Mapping[str, str], Measured]]) -> None:
    """Keep measurements, each under its key; where the folder cannot be written, say so once and go on."""
    _SHELF.write(measurements)


def _file_digest(backend: Backend) -> str:
    """Of the file that holds a plug-in: while it is being written its version stays."""
    try:
        content = Path(inspect.getfile(backend)).read_bytes()
    except (OSError, TypeError):
        return "no file"
    return hashlib.sha256(content).hexdigest()[:16]
