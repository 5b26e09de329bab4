"""A backend's times in a case, and the figures that are made of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import torch

from tessera.attention.contract import Phase
from tessera.bench.kernels.cases import KernelCase, Part
from tessera.bench.kernels.cost import Cost, cost
from tessera.bench.kernels.entrants import Entrant
from tessera.bench.kernels.timing import Timed


@dataclass
class Runner:
    """An entrant that is ready, and its times; `failure` ends it."""

    entrant: Entrant
    parts: list[Timed] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)
    failure: str = ""

    def sample(self) -> None:
        """Time every part once, and keep the sum."""
        total, on_device = 0.0, list[float]()
        for timed in self.parts:
            times = timed.sample()
            if len(self.parts) > 1 or len(times) > 1:
                for way, milliseconds in times.items():
                    self._keep(f"{timed.proof.phase}_{way}_ms", milliseconds)
            if timed.launches:
                self._keep(f"{timed.proof.phase}_launch_ms", timed.launches[-1])
            total += times[timed.way]
            if (device_ms := timed.device_ms(times)) is not None:
                on_device.append(device_ms)
        self._keep("ms", total)
        if on_device:
            self._keep("device_ms", sum(on_device))

    def check(self) -> None:
        """Raise BackendError where a part does not answer rightly any more."""
        for timed in self.parts:
            timed.check()

    def _keep(self, name: str, milliseconds: float) -> None:
        self.samples.setdefault(name, []).append(milliseconds)


def cost_of(case: KernelCase, part: Part) -> Cost:
    """What the sequences of one part must compute and move."""
    causal = part.phase is not Phase.VISION
    itemsize = getattr(torch, case.dtype).itemsize
    return cost(part.lens, case.heads, itemsize, causal=causal, window=case.window if causal else None)


def metrics_of(runner: Runner, total: Cost, tokens: int) -> dict[str, float]:
    """Of all repeats; rates are those of the median. Milliseconds are of one layer."""
    times = runner.samples["ms"]
    median = statistics.median(times)
    metrics = {
        "ms_median": median,
        "ms_mean": statistics.fmean(times),
        "ms_std": statistics.stdev(times) if len(times) > 1 else 0.0,
        "plan_ms": sum(timed.plan_ms for timed in runner.parts),
        "tok_s": 1000 * tokens / median,
        "tflop_s": total.flops / median / 1e9,
        "tb_s": total.num_bytes / median / 1e9,
        "max_error": max(timed.error[0] for timed in runner.parts),
        "rms_error": max(timed.error[1] for timed in runner.parts),
    }
    for name, times in runner.samples.items():
        if name != "ms":
            metrics[name if name.endswith("_launch_ms") else f"{name}_median"] = statistics.median(times)
    return metrics
