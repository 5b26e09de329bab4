"""What tables of kernels are made of: titles of cases, numbers, names of kernels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tessera.bench.record import Record, Value


@dataclass(frozen=True)
class Table:
    """A title, rows of which the first is the header, and lines beneath; either may be empty."""

    title: str
    rows: list[tuple[str, ...]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def by_case(rows: Iterable[Record]) -> dict[str, list[Record]]:
    """Rows that are compared with one another, in their order."""
    found: dict[str, list[Record]] = {}
    for row in rows:
        found.setdefault(row.case_key, []).append(row)
    return found


def case_title(case: Mapping[str, Value]) -> str:
    """`prefill 2q4k, heads 32/8/128, bfloat16, pages of 16`."""
    of = {"page_size": "pages of {}", "window": "window {}", "soft_cap": "soft cap {}"}
    more = [text.format(case[name]) for name, text in of.items() if name in case]
    if case["mode"] != "engine":
        more.append(f"{case['mode']} only")
    return ", ".join([f"{case['phase']} {case['workload']}", f"heads {case['heads']}", str(case["dtype"]), *more])


def kernel_name(symbol: str) -> str:
    """A kernel's name without namespaces, template and call arguments: what tells it from others at a glance."""
    plain = re.sub(r"^void ", "", symbol)
    if "::" in plain and re.search(r"device_kernel<", plain):  # CUTLASS: the kernel is the argument
        inner = re.findall(r"(\w*(?:Attn|Flash|Fwd|Kernel)\w*)<", plain.partition("device_kernel<")[2])
        plain = next(iter(inner), plain)
    plain = re.split(r"[<(]", plain)[0]
    name = plain if plain.startswith(("aten::", "triton_interpreted::")) else plain.rpartition("::")[2]
    return name if len(name) <= 48 else f"{name[:22]}..{name[-24:]}"


def three(value: float) -> str:
    """Three digits that count, without an exponent."""
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.{max(0, min(6, 2 - math.floor(math.log10(value))))}f}"
