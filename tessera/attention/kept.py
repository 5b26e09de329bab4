"""What was found by measuring, on disk: JSON under a key that holds everything it depends on.

A file that is missing, damaged or of another key is as good as none, never an error.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import torch

from tessera.folders import cache_folder
from tessera.log import logger

Found = TypeVar("Found")
Key = Mapping[str, str]


@dataclass(frozen=True)
class _Stored:
    key: dict[str, str]
    found: msgspec.Raw


@dataclass(frozen=True)
class Shelf(Generic[Found]):
    """A folder of results of one kind, each in a file named after its key."""

    folder: str
    """Below tessera's own."""
    kind: type[Found]
    what: str
    """What one is called in a warning."""
    otherwise: str
    """What happens where one cannot be read, and that none is kept, in the same words."""
    unkept: str

    def read(self, key: Key) -> Found | None:
        """What is kept under this key; None where nothing is or where it cannot be read, which is said once."""
        path = None
        try:
            path = self.path(key)
            stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
            if stored.key == dict(key):
                return msgspec.json.decode(stored.found, type=self.kind)
            _warn(f"the {self.what} in {path} is of something else and {self.otherwise}")
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            if path is not None and os.path.exists(path):  # what is wrong with the folder `write` will say
                _warn(f"the {self.what} in {path} cannot be read and {self.otherwise}: {error}")
        return None

    def write(self, results: Iterable[tuple[Key, Found]]) -> None:
        """Keep results, each under its key; where the folder cannot be written, say so once and go on."""
        try:
            for key, found in results:
                path = self.path(key)
                path.parent.mkdir(parents=True, exist_ok=True)
                content = _Stored(dict(key), msgspec.Raw(msgspec.json.encode(found)))
                with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, delete=False) as file:
                    file.write(msgspec.json.format(msgspec.json.encode(content), indent=1))
                os.replace(file.name, path)
        except OSError as error:
            logger.warning("%s: %s", self.unkept, error)

    def path(self, key: Key) -> Path:
        """Where the result of this key is kept. OSError: nowhere."""
        digest = hashlib.sha256(msgspec.json.encode(dict(sorted(key.items())))).hexdigest()
        return cache_folder() / self.folder / f"{digest[:32]}.json"


def machine(device_type: str) -> dict[str, str]:
    """The part of a key that names the device and what drives it."""
    return {
        "device": device_name(device_type),
        "driver": driver() if device_type == "cuda" else "",
        "cuda": str(torch.version.cuda),
    }


@cache
def code_digest(patterns: tuple[str, ...]) -> str:
    """Of the files of ours, below the package, that decide what is found."""
    folder = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def device_name(device_type: str) -> str:
    """The GPU's name, or the processor's."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor())} ({platform.machine()})"


def driver() -> str:
    """The driver's own line where Linux shows it."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


@cache
def _warn(message: str) -> None:
    """Log a warning the first time that it is to be given."""
    logger.warning("%s", message)
