"""Where a figure comes from: code, versions, machine, command."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = (
    "tessera-llm",
    "torch",
    "triton",
    "transformers",
    "flash-attn-4",
    "fa3-fwd",
    "flashinfer-python",
    "xformers",
    "vllm",
    "llama-cpp-python",
)
"""Distributions whose versions may change a figure."""
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "neon", "asimd", "sve")


@dataclass(frozen=True)
class Machine:
    """The hardware, as far as it explains a figure; nothing that tells whose it is."""

    cpu: str
    cores: int
    """That this process may use."""
    memory_gib: float
    cpu_features: list[str]
    system: str
    python: str
    gpus: list[str] = field(default_factory=list)
    driver: str | None = None
    cuda: str | None = None

    @property
    def name(self) -> str:
        """In a line: the GPUs, or the processor with its cores."""
        return ", ".join(self.gpus) if self.gpus else f"{self.cpu}, {self.cores} cores"


@dataclass(frozen=True)
class Provenance:
    """What is needed to run a measurement again, and to know why it would come out otherwise."""

    commit: str
    """Of tessera's checkout, with `+` and a digest of the changes where files differ from it; `unknown` outside one."""
    versions: dict[str, str]
    machine: Machine
    command: str
    """What to type to repeat it."""
    run: str
    """The same for all rows of one command."""
    started: str
    """ISO 8601, UTC."""
    continues: str = ""
    """The first run of a command that was interrupted and goes on with this one. Only what is of one `run` was measured
    side by side."""


def provenance(command: str | None = None) -> Provenance:
    """Of a command that starts now; left out, `command` is how this process was called."""
    now = datetime.datetime.now(datetime.UTC)
    return Provenance(
        commit=commit(),
        versions=versions(),
        machine=machine(),
        command=command or command_line(),
        run=f"{now:%Y%m%dT%H%M%S}-{os.getpid()}",
        started=now.isoformat(timespec="seconds"),
    )


def command_line() -> str:
    """How this process was called, as a user would type it, with what decides in the environment what runs."""
    program = Path(sys.argv[0]).name
    words = ["tessera" if program in ("tessera", "cli.py", "__main__.py") else program, *sys.argv[1:]]
    interpreted = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return interpreted + shlex.join(words)


@cache
def commit() -> str:
    """The commit of the checkout this package lies in; `unknown` where it lies in none."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return "unknown"
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        changes = _git(folder, "diff", "HEAD")
        return head + (f"+{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Of those `PACKAGES` that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "torch" in sys.modules:
        found["torch"] = str(sys.modules["torch"].__version__)  # with the build: 2.11.0+cu130
    return found


@cache
def machine() -> Machine:
    """The machine this runs on."""
    cpu, features = _cpu()
    gpus, driver, cuda = _gpus()
    return Machine(
        cpu=cpu,
        cores=len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        cpu_features=features,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        gpus=gpus,
        driver=driver,
        cuda=cuda,
    )


def _cpu() -> tuple[str, list[str]]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = named.get("model name") or platform.processor() or platform.machine()
    flags = f"{named.get('flags', '')} {named.get('Features', '')}".split()
    return name, [feature for feature in _CPU_FEATURES if feature in flags]


def _gpus() -> tuple[list[str], str | None, str | None]:
    """Names, driver, CUDA of torch; asked of torch, which is imported already where a GPU matters."""
    import torch

    if not torch.cuda.is_available():
        return [], None, None
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    try:
        driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = None
    return names, driver, torch.version.cuda


def _git(folder: Path, *words: str) -> str:
    return _run("git", "-C", str(folder), *words)


def _run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
