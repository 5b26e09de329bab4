"""Where the time of a step goes: what the host does, what the device computes, and when neither waits for the other.

Runs decode steps of so many sequences with random prompts, profiles a few of them in the middle, prints one Markdown
table and draws the steps as lanes: the host's parts above, the device's kernels by kind below. The first row is of
steps before, for a profiler slows the host down, most where it launches most. On a CPU there is no
device beside the host, and one lane of operators stands in its place.

    python benchmarks/timeline.py --model dummy:135m --sequences 1 --figure timeline.svg
    python benchmarks/timeline.py --model dummy:135m --sequences 128 --set cuda_graphs=false overlap=false
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from engine_settings import settings_of
from torch.profiler import DeviceType, ProfilerActivity, profile

from tessera import SamplingParams
from tessera.config import EngineConfig
from tessera.engine.build import build_engine
from tessera.engine.engine import Engine
from tessera.types import Request

KINDS = (
    ("attention", r"attn|attention|prefill|decode|flash|fmha|softmax|Batch\w*KVCache"),
    ("products", r"nvjet|gemm|gemv|cutlass|few_rows|more_rows|many_rows|splitK|mkldnn_linear|linear|addmm|bmm|::mm"),
    ("copies", r"Memcpy|Memset|copy"),
)
"""What a kernel or operator is for, by its name; 'other' where none fits: norms, rotation, activations, sampling."""
COLOURS = {"attention": "#4269d0", "products": "#efb118", "copies": "#9c9c9c", "other": "#3ca951"}
HOST_COLOURS = {"schedule": "#97bbf5", "begin": "#6cc5b0", "wait": "#eeeeee", "commit": "#ff8ab7"}


class Span(NamedTuple):
    """A piece of time, in microseconds since the profile began."""

    kind: str
    start: float
    end: float


class Watched:
    """Anything whose calls are noted by name; all else is passed on."""

    def __init__(self, inner: Any, note: Callable[[str, int, int], None], names: dict[str, str]) -> None:
        self._inner, self._note, self._names = inner, note, names

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._names:
            return found

        def noted(*arguments: Any) -> Any:
            started = time.time_ns()
            result = found(*arguments)
            self._note(self._names[name], started, time.time_ns())
            return Watched(result, self._note, {"result": "wait"}) if name == "begin" and result else result

        return noted


@contextmanager
def watch(engine: Engine) -> Iterator[list[tuple[str, int, int]]]:
    """What the host does within: (part, start, end), nanoseconds since the epoch."""
    noted: list[tuple[str, int, int]] = []
    whole = engine._executor, engine._scheduler

    def note(part: str, start: int, end: int) -> None:
        noted.append((part, start, end))

    engine._executor = Watched(whole[0], note, {"begin": "begin"})
    engine._scheduler = Watched(whole[1], note, {"schedule": "schedule", "commit": "commit"})  # type: ignore[assignment]
    try:
        yield noted
    finally:
        engine._executor, engine._scheduler = whole


def kind_of(name: str) -> str:
    """What a kernel or operator is for."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def record(engine: Engine, num_steps: int) -> tuple[list[Span], list[Span], float]:
    """Spans of the host and of the device in so many steps, and the microseconds they took."""
    on_cuda = torch.cuda.is_available() and engine.info.device.startswith("cuda")
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler, watch(engine) as noted:
        started = time.perf_counter()
        for _ in range(num_steps):
            engine.step()
        if on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    zero: int = profiler.profiler.kineto_results.trace_start_ns()
    host = [Span(part, (start - zero) / 1000, (end - zero) / 1000) for part, start, end in noted]
    events = profiler.events() or ()
    if on_cuda:  # without the host's calls of the driver, which are recorded beside them
        ran = [event for event in events if event.device_type == DeviceType.CUDA]
    else:
        ran = [event for event in events if event.cpu_parent is None]
    return host, own_times(ran), seconds * 1e6


def own_times(events: list[Any]) -> list[Span]:
    """Kernels or operators without what they wait for the one before: dependent launches are there while it runs."""
    spans, over = [], float("-inf")
    for event in sorted(events, key=lambda event: event.time_range.end):
        start, end = float(event.time_range.start), float(event.time_range.end)
        spans.append(Span(kind_of(event.name), max(start, over), end))
        over = end
    return spans


def busy(spans: list[Span]) -> float:
    """Microseconds in which at least one of the spans runs."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda each: each.start):
        total += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return total


def summarise(host: list[Span], device: list[Span], wall: float, num_steps: int) -> dict[str, float]:
    """Microseconds a step of each part."""
    parts = {f"host: {kind}": busy([s for s in host if s.kind == kind]) for kind in HOST_COLOURS}
    kinds = {f"device: {kind}": busy([s for s in device if s.kind == kind]) for kind in COLOURS}
    totals = {"step, profiled": wall, "device busy": busy(device), "device waits": wall - busy(device)}
    each = {name: round(value / num_steps, 1) for name, value in (totals | parts | kinds).items()}
    share = 100 * kinds["device: attention"] / max(1e-9, busy(device))
    return each | {"attention, % of busy": round(share, 1), "launches": round(len(device) / num_steps, 1)}


def draw(host: list[Span], device: list[Span], title: str, path: Path) -> None:
    """The spans as two lanes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(figsize=(12, 2.6), layout="constrained")
    begin = min(span.start for span in [*host, *device])
    for lane, spans, colours in ((1, host, HOST_COLOURS), (0, device, COLOURS)):
        for kind, colour in colours.items():
            bars = [(span.start - begin, span.end - span.start) for span in spans if span.kind == kind]
            axes.broken_barh(bars, (lane + 0.1, 0.8), facecolors=colour)
    axes.set_yticks([0.5, 1.5], ["device", "host"])
    axes.set_xlabel("microseconds")
    axes.set_title(title, loc="left", fontsize=10)
    legend = [Patch(color=colour, label=kind) for kind, colour in (HOST_COLOURS | COLOURS).items()]
    axes.legend(handles=legend, ncols=len(legend), loc="upper center", bbox_to_anchor=(0.5, -0.3), frameon=False)
    figure.savefig(path)


def fill(engine: Engine, num_sequences: int, prompt: int, num_steps: int, warm_up: int) -> None:
    """Add requests that outlast the profile, and run their prompts and some decode steps."""
    source = random.Random(0)
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_steps + 3 * warm_up + 8)
    for number in range(num_sequences):
        tokens = [source.randrange(1000) for _ in range(prompt)]
        engine.add(Request(str(number), tokens, params))
    while engine.status().waiting:
        engine.step()
    for _ in range(warm_up):
        engine.step()


def time_steps(engine: Engine, num_steps: int) -> float:
    """Microseconds of a step without a profiler, which slows the host down."""
    started = time.perf_counter()
    for _ in range(num_steps):
        engine.step()
    return 1e6 * (time.perf_counter() - started) / num_steps


def main() -> None:
    """Print the table; with --figure and --json write them too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=3, help="decode steps to profile")
    parser.add_argument("--warm-up", type=int, default=8, help="decode steps before")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the engine, JSON values"
    )
    parser.add_argument("--figure", type=Path, help="SVG file")
    parser.add_argument("--json", type=Path, help="file to append a row to")
    options = parser.parse_args()
    settings = settings_of(parser, options.set)
    engine = build_engine(EngineConfig.from_flat({"model": options.model, **settings}))
    fill(engine, options.sequences, options.prompt, options.steps, options.warm_up)
    plain = time_steps(engine, options.warm_up)
    host, device, wall = record(engine, options.steps)
    found = {"step": round(plain, 1)} | summarise(host, device, wall, options.steps)
    info, given = engine.info, " ".join(options.set)
    title = f"{info.model} {info.dtype}, {options.sequences} sequences, {info.device} {given}"
    print(f"{title}\n\n| part | us a step |\n| --- | --- |")
    for name, value in found.items():
        print(f"| {name} | {value:,.1f} |")
    if options.figure:
        draw(host, device, title, options.figure)
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps({"title": title, "torch": torch.__version__, **found}) + "\n")


if __name__ == "__main__":
    main()
