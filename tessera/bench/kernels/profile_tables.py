"""What was found in each call, as tables and as JSON: a line a kernel, beneath it why some columns are empty."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

import msgspec

from tessera.bench.kernels.profile import CallProfile, KernelProfile
from tessera.bench.kernels.words import Table, case_title, kernel_name, three

NEEDS_GPU = (
    "--profile looks into kernels on a CUDA GPU; on a CPU these are the operators that torch ran, with the time that "
    "each took by itself"
)
_COLUMNS = ("kernel", "calls", "ms", "of the call")
_RATES = ("TB/s", "of ceiling", "TFLOP/s", "of ceiling")
_BLOCKS = ("registers", "spills", "shared", "warps", "occupancy")
_COUNTED = ("achieved", "L1 hits", "L2 hits", "bank conflicts")


def profile_tables(profiles: Sequence[CallProfile]) -> list[Table]:
    """A table for each call, in the order in which they were made; [] where nothing was profiled."""
    if not profiles:
        return []
    on_cpu = all(each.device == "cpu" for each in profiles)
    head = Table(NEEDS_GPU if on_cpu else "into each call: the times of its kernels on the device, caches cold before")
    return [head, *map(_table, profiles)]


def profile_json(profile: CallProfile) -> str:
    """The same on one line."""
    fields = {
        "kind": "kernel profile",
        "case": profile.case.fields,
        "backend": profile.backend,
        "ms": profile.ms,
        "problem": profile.problem,
        "no_counters": profile.no_counters,
        "kernels": [asdict(each) for each in profile.kernels],
    }
    return msgspec.json.encode(fields).decode()


def _table(profile: CallProfile) -> Table:
    title = f"{profile.backend}, {case_title(profile.case.fields)}"
    if not profile.kernels:
        return Table(title, lines=[f"nothing was seen: {profile.problem}"])
    if profile.device == "cpu":
        body = [(each.symbol, f"{each.calls:g}", three(each.ms), _share(each, profile)) for each in profile.kernels]
        return Table(title, [_COLUMNS, *body[:12]], [f"{len(body) - 12} shorter ones left out"] * (len(body) > 12))
    longest = max(profile.kernels, key=lambda each: each.ms)
    rows: list[tuple[str, ...]] = [(*_COLUMNS, *_RATES, *_BLOCKS, *_COUNTED)]
    for each in profile.kernels:
        rates = _rates(profile, each.ms) if each is longest else [""] * 4
        name, calls = kernel_name(each.symbol), f"{each.calls:g}"
        rows.append((name, calls, three(each.ms), _share(each, profile), *rates, *_block(each), *_counted(each)))
    if len(profile.kernels) > 1:
        rows.append(("all", "", three(profile.ms), "100%", *_rates(profile, profile.ms), *[""] * 9))
    return Table(title, rows, list(_lines(profile)))


def _lines(profile: CallProfile) -> Iterator[str]:
    """What a reader must know of the columns."""
    yield "TB/s and TFLOP/s: what the case must move and compute, in the time of this kernel"
    if any(each.spills is None for each in profile.kernels):
        yield "spills unknown: only Triton tells them, of kernels that it compiled in this process"
    if any(each.counters.occupancy is None and each.estimate is not None for each in profile.kernels):
        yield "achieved occupancy with ~: what the profiler makes of grid and blocks, not counted"
    if profile.no_counters:
        yield f"achieved occupancy, hits and bank conflicts not counted: {profile.no_counters}"


def _share(kernel: KernelProfile, profile: CallProfile) -> str:
    return f"{kernel.ms / profile.ms:.0%}" if profile.ms else "-"


def _rates(profile: CallProfile, ms: float) -> Iterable[str]:
    """Of the case's bytes and operations, and as shares of what was measured in the same run."""
    cost, ceilings = profile.cost, profile.ceilings
    for amount, ceiling in (
        (cost.num_bytes, ceilings.bytes_s if ceilings else None),
        (cost.flops, ceilings.flop_s if ceilings else None),
    ):
        per_second = 1000 * amount / ms
        yield three(per_second / 1e12)
        yield f"{per_second / ceiling:.0%}" if ceiling else "unknown"


def _block(kernel: KernelProfile) -> Iterable[str]:
    shared = None if kernel.shared_bytes is None else f"{kernel.shared_bytes / 1024:.3g} KiB"
    share = None if kernel.occupancy is None else f"{kernel.occupancy:.0%}"
    for value in (kernel.registers, kernel.spills, shared, kernel.warps, share):
        yield "unknown" if value is None else str(value)


def _counted(kernel: KernelProfile) -> Iterable[str]:
    found = kernel.counters
    if found.occupancy is None and kernel.estimate is not None:
        yield f"~{kernel.estimate:.0%}"
    else:
        yield "-" if found.occupancy is None else f"{found.occupancy:.0%}"
    for share in (found.l1_hits, found.l2_hits):
        yield "-" if share is None else f"{share:.0%}"
    yield "-" if found.bank_conflicts is None else f"{found.bank_conflicts:,.0f}"
