"""Into one call of a backend, kernel by kernel: device time, and what the profiler and the compiler know of each."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tessera.attention.prove import profile_kernels
from tessera.bench.kernels.cases import KernelCase
from tessera.bench.kernels.ceilings import Ceilings
from tessera.bench.kernels.context import one_line
from tessera.bench.kernels.cost import Cost
from tessera.bench.kernels.ncu import Counters, count
from tessera.bench.kernels.occupancy import Multiprocessor, multiprocessor, occupancy
from tessera.bench.kernels.timing import Cold, Timed

CALLS = 3
"""That are profiled; times are medians."""


@dataclass(frozen=True)
class KernelProfile:
    """One kernel of a call, on a CPU one operator; None is what nobody knows."""

    symbol: str
    calls: float
    """A layer."""
    ms: float
    """All calls of a layer together, on the device."""
    registers: int | None = None
    """A thread."""
    spills: int | None = None
    """Registers of a thread that lie in memory; only Triton tells."""
    shared_bytes: int | None = None
    """A block."""
    warps: int | None = None
    """A block."""
    occupancy: float | None = None
    """In theory, of a multiprocessor's warps."""
    estimate: float | None = None
    """Of the same, what the profiler takes to be reached, from the blocks that there are; it counts nothing."""
    counters: Counters = field(default_factory=Counters)


@dataclass(frozen=True)
class CallProfile:
    """One backend's call of one layer in one case of one phase, without a graph where it was timed without one too."""

    backend: str
    case: KernelCase
    cost: Cost
    ceilings: Ceilings | None
    kernels: list[KernelProfile]
    """Most time first."""
    device: str
    problem: str = ""
    """Why there are no kernels."""
    no_counters: str = ""
    """Why Nsight Compute counted nothing."""

    @property
    def ms(self) -> float:
        """Of all kernels, on a CPU of all operators."""
        return sum(each.ms for each in self.kernels)


def profile_call(timed: Timed, case: KernelCase, cost: Cost, ceilings: Ceilings | None, cold: Cold) -> CallProfile:
    """Look into what was timed, with cold caches; whatever goes wrong is said in `problem`.

    case  of the one phase that was timed
    """
    name, device = timed.proof.backend, "cuda" if torch.cuda.is_available() and cold.memory.is_cuda else "cpu"
    kernels: list[KernelProfile] = []
    problem = ""
    try:
        assert timed.call is not None
        kernels = _on_cuda(timed, cold) if device == "cuda" else _on_cpu(timed, cold)
    except Exception as error:  # a profiler may raise anything, and the times stand without it
        problem = one_line(error)
    return CallProfile(name, case, cost, ceilings, kernels, device, problem)


def with_counters(profile: CallProfile, seed: int) -> CallProfile:
    """With what Nsight Compute counts in a process of its own, which takes the memory of one copy of the inputs.

    seed  of the inputs
    """
    if profile.device != "cuda" or not profile.kernels:
        return profile
    counted, refusal = count(profile.backend, profile.case, seed, [each.symbol for each in profile.kernels])
    kernels = [replace(each, counters=counted.get(each.symbol, Counters())) for each in profile.kernels]
    return replace(profile, kernels=kernels, no_counters=refusal)


def _on_cpu(timed: Timed, cold: Cold) -> list[KernelProfile]:
    """Operators: what a CPU has in place of kernels."""
    assert timed.call is not None
    cold.empty()
    uses = profile_kernels(timed.call, "cpu")
    return [KernelProfile(use.name, use.calls, use.microseconds / 1000) for use in uses if use.microseconds > 0]


def _on_cuda(timed: Timed, cold: Cold) -> list[KernelProfile]:
    assert timed.call is not None
    traces = []
    for _ in range(CALLS):
        cold.memory.zero_()
        torch.cuda.synchronize()
        traces.append(_trace(timed.call))
    return kernels_of(traces, timed.num_layers, multiprocessor(), triton_kernels())


def _trace(call: Callable[[], object]) -> dict[str, Any]:
    """What torch's profiler exports of a call: the only place where it says what a kernel's blocks take."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace: dict[str, Any] = json.loads(path.read_text())
    return trace


def kernels_of(
    traces: Iterable[Mapping[str, Any]], num_layers: int, unit: Multiprocessor, compiled: Mapping[str, list[Any]]
) -> list[KernelProfile]:
    """The kernels of one layer, most time first, from traces of the same call.

    traces      as torch.profiler exports them: events of the category `kernel` and of copies
    num_layers  that each trace has
    compiled    what Triton compiled in this process, by name
    """
    spent: defaultdict[str, list[float]] = defaultdict(list)
    calls: dict[str, int] = {}
    last: dict[str, dict[str, Any]] = {}
    for trace in traces:
        found: defaultdict[str, list[float]] = defaultdict(list)
        for event in trace.get("traceEvents", []):
            if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
                found[event["name"]].append(float(event["dur"]) / 1000)
                last[event["name"]] = event.get("args", {})
        for symbol, times in found.items():
            spent[symbol].append(sum(times))
            calls[symbol] = len(times)
    if not spent:
        raise RuntimeError("the profiler saw no kernel: reading the GPU's activity may be forbidden here")
    kernels = [
        _kernel(symbol, calls[symbol] / num_layers, statistics.median(times) / num_layers, last[symbol], unit, compiled)
        for symbol, times in spent.items()
    ]
    return sorted(kernels, key=lambda kernel: -kernel.ms)


def _kernel(
    symbol: str, calls: float, ms: float, told: Mapping[str, Any], unit: Multiprocessor, compiled: Mapping[str, Any]
) -> KernelProfile:
    registers, shared, block = (told.get(key) for key in ("registers per thread", "shared memory", "block"))
    if registers is None or shared is None or not block:  # a copy
        return KernelProfile(symbol, calls, ms)
    threads = block[0] * block[1] * block[2]
    warps = -(-threads // 32)
    share = occupancy(unit, registers=registers, shared_bytes=shared, warps=warps)
    spills, percent = _spills(compiled.get(symbol, ()), registers, shared), told.get("est. achieved occupancy %")
    estimate = None if percent is None else float(percent) / 100
    return KernelProfile(symbol, calls, ms, registers, spills, shared, warps, share, estimate)


def _spills(variants: Iterable[Any], registers: int, shared: int) -> int | None:
    """Of the variant of a Triton kernel that takes as much as the profiler saw; None where that is none or several."""
    alike = {int(each.n_spills) for each in variants if (each.n_regs, each.metadata.shared) == (registers, shared)} or {
        int(each.n_spills) for each in variants
    }
    return alike.pop() if len(alike) == 1 else None


def triton_kernels() -> dict[str, list[Any]]:
    """What Triton compiled and loaded for our own kernels in this process, by the name that a profiler sees."""
    found: defaultdict[str, list[Any]] = defaultdict(list)
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("tessera.kernels.")]
    for kernel in {id(each): each for module in modules for each in vars(module).values()}.values():
        for variant in _variants(getattr(kernel, "device_caches", None)):
            if getattr(variant, "n_regs", None) is not None and getattr(variant, "n_spills", None) is not None:
                found[variant.metadata.name].append(variant)
    return dict(found)


def _variants(caches: Any) -> Iterator[Any]:
    """The compiled kernels in what Triton keeps a device: a tuple that begins with a dict of them."""
    for of_device in caches.values() if isinstance(caches, Mapping) else ():
        compiled = of_device[0] if isinstance(of_device, tuple) else of_device
        yield from compiled.values() if isinstance(compiled, Mapping) else ()
