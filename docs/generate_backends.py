"""Write docs/BACKENDS.md from what the backends say of themselves; with --check, only say whether it is stale.

Backends are imported, their libraries are not: the page is the same on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tessera.attention.contract import AttentionBackend, Claim, Limits, Phase
from tessera.attention.registry import BACKENDS, load_backend
from tessera.attention.verify import base_shape, dtype_name
from tessera.attention.workloads import TOLERANCE
from tessera.errors import TesseraError

Backends = dict[str, type[AttentionBackend[Any]]]

PAGE = Path(__file__).parent / "BACKENDS.md"
VERIFIED = Path(__file__).parent / "results" / "backends_verified.md"
HEAD = """# Attention backends
<!-- Made by docs/generate_backends.py (`make docs`) from what the code says; `make lint` fails when it is stale. -->

What each backend says it serves. A shape outside these limits is refused at start with every reason (`tessera backends`
lists them for a model); a backend may refuse more, where it depends on the machine or on several things at once.
`tessera verify NAME` checks the claims on your machine, docs/WRITE_A_BACKEND.md says how to add a backend.

- **padded**: served by padding heads with zeros, right but at the cost of the larger size.
- **group**: query heads a key-value head. **both ways**: not causal, over pages; vision always is.
- **graphs**: a CUDA graph may record it. **invariant**: a sequence's bits do not depend on the rest of the batch.
"""
BUILT = """
**flashinfer** has a module for each type, head size and feature (a window, a soft cap), compiled on first use and kept
on disk. Auto does not wait for that and leaves out what is not built yet. Named once, as in `--prefill-attention
flashinfer:fa2`, it is built with nvcc, about a minute a variant; auto takes it from then on, where it is the fastest.
The package `flashinfer-jit-cache` brings the modules ready-made.

**triton** is compiled with tiles, warps, stages and splits that are shipped by GPU, with where they were measured
(`attention/backends/triton_tables.py`: H200 and H100; any other begins with the same, cut down to its shared memory).
`tessera tune` looks beside them for this GPU and a model's heads, about 20 seconds a phase and part, and keeps what is
faster; a GPU that no table knows is tuned at its first start where `triton` may serve, unless `--attention-measure` is
off. The reason of a choice says which options serve. The rungs of the ladder (`triton:...`) keep what is shipped.
"""
COLUMNS = (
    "backend",
    "types",
    "head_dim",
    "page size",
    "group",
    "window",
    "soft cap",
    "sinks",
    "both ways",
    "graphs",
    "invariant",
    "devices",
)
EVERYTHING = {"head_dim": range(1, 1025), "page size": range(1, 4097), "group": range(1, 1025)}
"""What the contract takes by default; shown as `any`."""


def main(argv: Sequence[str]) -> int:
    """Write or check the page; 1 where it is stale or a backend cannot be described."""
    try:
        text = page({name: load_backend(name) for name in BACKENDS})
    except TesseraError as error:
        sys.stderr.write(f"error: docs/BACKENDS.md cannot be made: {error}\n")
        return 1
    if "--check" not in argv:
        PAGE.write_text(text)
        return 0
    if PAGE.exists() and PAGE.read_text() == text:
        return 0
    sys.stderr.write("error: docs/BACKENDS.md is not what the backends say now\n\nhint: make docs\n")
    return 1


def page(backends: Backends) -> str:
    """The whole page."""
    sections = [HEAD, install_section(backends)]
    sections += [phase_section(phase, backends) for phase in Phase]
    sections.append(claim_section(backends))
    if VERIFIED.exists():
        sections.append(VERIFIED.read_text().strip() + "\n")
    return "\n".join(sections)


def install_section(backends: Backends) -> str:
    """What each needs."""
    rows = [("backend", "phases", "needs", "install")]
    for name, backend in backends.items():
        phases = ", ".join(phase for phase in Phase if phase in backend.limits)
        rows.append((f"`{name}`", phases, ", ".join(backend.needs) or "-", _code(backend.install)))
    return "## What to install\n" + table(rows) + BUILT


def phase_section(phase: Phase, backends: Backends) -> str:
    """The limits of all that serve a phase."""
    columns = [column for column in COLUMNS if phase is not Phase.VISION or column not in ("page size", "both ways")]
    rows: list[Sequence[str]] = [columns]
    for name, backend in backends.items():
        if phase in backend.limits:
            cells = _limit_cells(backend.limits[phase]) | {"backend": f"`{name}`", "types": _types(backend, phase)}
            rows.append([cells[column] for column in columns])
    return f"## {phase.capitalize()}\n" + table(rows)


def claim_section(backends: Backends) -> str:
    """Which kernels a profiler must see."""
    rows = [("backend", "phase", "on", "each must be found", "none may be found")]
    for name, backend in backends.items():
        lines: dict[tuple[str, str, str], list[str]] = {}
        for phase, limits in backend.limits.items():
            for device in (device for device in ("cuda", "cpu") if device in limits.devices):
                claim = _claim(backend, phase, device)
                key = (device, _patterns(claim.must), _patterns(claim.must_not))
                lines.setdefault(key, []).append(str(phase))
        rows += [(f"`{name}`", ", ".join(phases), *key) for key, phases in lines.items()]
    return (
        "## Claims\n"
        "Regular expressions that `--prove-attention` and `tessera verify` hold against the names of CUDA kernels, on\n"
        "a CPU of operators. Where a claim depends on the shape: in bfloat16, on CUDA for compute capability 9.0.\n\n"
        + table(rows)
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first row as its head."""
    head, *body = rows
    lines = [_line(head), _line(["---"] * len(head)), *(_line(row) for row in body)]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _limit_cells(limits: Limits) -> dict[str, str]:
    head_dim = _sizes(limits.head_dims, EVERYTHING["head_dim"])
    return {
        "head_dim": head_dim + _padded(limits),
        "page size": _sizes(limits.page_sizes, EVERYTHING["page size"]),
        "group": _sizes(limits.groups, EVERYTHING["group"]),
        "window": _yes(limits.windows),
        "soft cap": _yes(limits.soft_caps),
        "sinks": _yes(limits.sinks),
        "both ways": _yes(limits.bidirectional),
        "graphs": _yes(limits.graphs),
        "invariant": ", ".join(d for d in ("cpu", "cuda") if d in limits.batch_invariant) or "no",
        "devices": _devices(limits),
    }


def _types(backend: type[AttentionBackend[Any]], phase: Phase) -> str:
    """The types of the limits, and where a device takes fewer of them, which."""
    types = [dtype for dtype in TOLERANCE if dtype in backend.limits[phase].dtypes]
    words = [", ".join(map(dtype_name, types))]
    for device, taken in getattr(backend, "dtypes_on", {}).items():
        words.append(f"on {device} {', '.join(dtype_name(dtype) for dtype in types if dtype in taken)} only")
    return "; ".join(words)


def _padded(limits: Limits) -> str:
    members = [size for size in EVERYTHING["head_dim"] if size in limits.head_dims]
    padded = [size for size in members if size in limits.padded_head_dims]
    if not padded:
        return ""
    others = [size for size in members if size not in limits.padded_head_dims]
    few = len(padded) <= len(others)
    return f"; padded: {_runs(padded)}" if few else f"; padded: all but {_runs(others)}"


def _sizes(sizes: Container[int], everything: range) -> str:
    members = [size for size in everything if size in sizes]
    return "any" if len(members) == len(everything) else _runs(members) or "none"


def _runs(numbers: list[int]) -> str:
    """Numbers in words: evenly spaced ones as a range."""
    if len(numbers) > 3 and len(steps := {b - a for a, b in pairwise(numbers)}) == 1:
        (step,) = steps
        return f"{numbers[0]} to {numbers[-1]}" + (f" in steps of {step}" if step > 1 else "")
    return ", ".join(map(str, numbers))


def _devices(limits: Limits) -> str:
    words = []
    for device in (device for device in ("cuda", "cpu") if device in limits.devices):
        low, high = (".".join(map(str, x)) for x in (limits.min_capability, limits.max_capability))
        bounds = [low] if limits.min_capability > (0, 0) else []
        if limits.max_capability < (999, 0):
            bounds = [low, "only"] if low == high else [*bounds, "to", high]
        elif bounds:
            bounds.append("or later")
        memory = f", {limits.shared_memory} bytes of shared memory a block" if limits.shared_memory else ""
        words.append(device if device == "cpu" else " ".join([device, *bounds]) + memory)
    return "; ".join(words)


def _claim(backend: type[AttentionBackend[Any]], phase: Phase, device: str) -> Claim:
    import torch

    limits = backend.limits[phase]
    dtype = next(dtype for dtype in (torch.bfloat16, *TOLERANCE) if dtype in limits.dtypes)
    shape = base_shape(backend, phase, dtype, "cpu")
    if device == "cuda":
        capability = min(max((9, 0), limits.min_capability), limits.max_capability)
        shape = replace(shape, device_type="cuda", capability=capability)
    try:
        return backend.claim(phase, shape)
    except Exception as error:  # a backend whose claim needs its library cannot be described without it
        raise TesseraError(
            f"{backend.name}.claim({phase}) on {device} raises {type(error).__name__}: {error}"
        ) from error


def _patterns(patterns: Iterable[str]) -> str:
    return "<br>".join(_code(pattern) for pattern in patterns) or "-"


def _code(text: str | None) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`" if text else "-"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
