"""Hardware counters of kernels, by Nsight Compute (`ncu`) where it is installed and permitted, in a process of its own.

Counting serialises and repeats kernels, so nothing is timed there.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tessera.bench.kernels.cases import KernelCase

METRICS = {
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "l1_hits": "l1tex__t_sector_hit_rate.pct",
    "l2_hits": "lts__t_sector_hit_rate.pct",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
}
"""Of `Counters`, as Nsight Compute names them (Kernel Profiling Guide, metrics reference)."""
SECONDS = 120
"""For one call of one backend, Python's start and compilation included."""
CHILD = "tessera.bench.kernels.ncu_child"


@dataclass(frozen=True)
class Counters:
    """Of one kernel, means over its launches; None is what was not counted."""

    occupancy: float | None = None
    """Warps that were active, as a share of those that a multiprocessor can hold, while it was busy at all."""
    l1_hits: float | None = None
    """Share of sectors."""
    l2_hits: float | None = None
    """Share of sectors."""
    bank_conflicts: float | None = None
    """Of shared memory, a launch."""


def count(
    backend: str, case: KernelCase, seed: int, symbols: Sequence[str], path: Mapping[str, str] = os.environ
) -> tuple[dict[str, Counters], str]:
    """The counters of a backend's kernels in one case, by symbol, and why there are none, which is empty if there are.

    case     of one phase
    symbols  of the kernels, as the profiler names them
    path     the environment in which ncu is looked for, and which it gets
    """
    ncu = _find(path)
    if ncu is None:
        return {}, "ncu, Nsight Compute's command line, is not on PATH"
    words = [ncu, *_flags(symbols), sys.executable, "-m", CHILD, *child_words(backend, case, seed)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, env=dict(path), check=False)
    except subprocess.TimeoutExpired:
        return {}, f"ncu did not end within {SECONDS} s"
    except OSError as error:
        return {}, f"{ncu} does not start: {error.strerror or error}"
    counted = parse(done.stdout)
    if not counted:
        return {}, refusal(done.stdout + done.stderr, done.returncode)
    return {symbol: counted[base_name(symbol)] for symbol in symbols if base_name(symbol) in counted}, ""


def child_words(backend: str, case: KernelCase, seed: int) -> list[str]:
    """What the process that is counted in is told: all that makes its inputs the same."""
    (part,) = case.parts
    words = {"heads": case.heads, "dtype": case.dtype, "seed": seed}
    asked = {"page-size": case.page_size, "window": case.window, "soft-cap": case.soft_cap}
    words |= {name: value for name, value in asked.items() if value is not None}
    return [backend, str(part.phase), part.workload, *(f"--{name}={value}" for name, value in words.items())]


def parse(text: str) -> dict[str, Counters]:
    """Counters by the kernel's base name, out of what `ncu --csv` prints; {} where that holds no table.

    Lines before the table are ncu's own messages. Percentages become shares; launches of a name are averaged.
    """
    lines = text.splitlines()
    head = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        return {}
    names = {metric: name for name, metric in METRICS.items()}
    found: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in csv.DictReader(line for line in lines[head:] if line.startswith('"')):
        name, value = names.get(row.get("Metric Name") or ""), _number(row.get("Metric Value"))
        if name is not None and value is not None:
            share = value / 100 if row.get("Metric Unit") == "%" else value
            found[base_name(row["Kernel Name"])][name].append(share)
    return {
        kernel: Counters(**{name: statistics.fmean(values) for name, values in metrics.items()})
        for kernel, metrics in found.items()
    }


def refusal(text: str, code: int) -> str:
    """Why ncu counted nothing, from what it printed."""
    if "ERR_NVGPUCTRPERM" in text:
        return "reading the GPU's counters is not permitted here (ERR_NVGPUCTRPERM): an administrator can allow it"
    told = [line for line in text.splitlines() if line.startswith("==ERROR==") or line.startswith("==WARNING==")]
    told = told or [line for line in text.splitlines() if line.strip()][-1:]
    return f"ncu counted nothing (exit code {code})" + (f": {told[0]:.200}" if told else "")


def base_name(symbol: str) -> str:
    """A kernel's name as ncu filters by: without its return type, namespaces, template and call arguments."""
    plain = re.split(r"[<(]", re.sub(r"^(void|\w+ __global__) ", "", symbol), maxsplit=1)[0].strip()
    return plain.rpartition("::")[2]


def _flags(symbols: Sequence[str]) -> list[str]:
    names = "|".join(re.escape(name) for name in dict.fromkeys(map(base_name, symbols)))
    counted = ["--csv", "--metrics", ",".join(METRICS.values()), "--kernel-name", f"regex:^({names})$"]
    return [*counted, "--profile-from-start", "off", "--target-processes", "application-only"]


def _find(path: Mapping[str, str]) -> str | None:
    """On PATH, else where CUDA's toolkit puts it."""
    toolkit = Path(path.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("ncu", path=os.pathsep.join((path.get("PATH", ""), str(toolkit))))


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:  # `n/a`, of a metric that this GPU does not count
        return None
