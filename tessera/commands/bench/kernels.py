"""Compare attention kernels alone: every backend on the same inputs, checked, proven, and timed in turn.

A workload is groups joined by _, each [COUNT]qNEW[k][sHELD[k]]: COUNT sequences with NEW new tokens that hold HELD in
all. Each answer is held against a reference first, then a profiler proves whose kernels ran; whoever fails either is a
row with the reason and without figures. Caches are cold in every timed call. Shares are of what this machine was
measured to do in the same run. Exit code 0: every backend that can run here did. 1: one failed,
or none of those that were named can run here.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tessera.bench.kernels.options import KernelOptions
from tessera.bench.places import check_file
from tessera.commands.flags import Parser, add_settings, engine_config, read_section
from tessera.config import DeviceConfig, ModelConfig, settings_of

if TYPE_CHECKING:
    from tessera.attention.contract import Shape
    from tessera.bench.kernels.profile import CallProfile
    from tessera.bench.record import Record

_ENGINE = ("model", "revision", "device", "cpu_threads")


def add_flags(parser: Parser) -> None:
    """What is compared on what; of the engine's settings those that kernels know."""
    parser.add_argument("model_word", metavar="MODEL", nargs="?", help="The same as --model.")
    parser.add_argument("--json", action="store_true", help="One JSON object a row on stdout, in place of tables.")
    add_settings(parser, "kernels", settings_of(KernelOptions))
    engine = [each for section in (ModelConfig, DeviceConfig) for each in settings_of(section)]
    add_settings(parser, "engine", [each for each in engine if each.name in _ENGINE])


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, append the rows to the file."""
    options = read_section(args, KernelOptions)
    path, compared = options.out_path, options.compared
    check_file("--out", path)
    config = engine_config(args)

    import torch

    from tessera.bench.benchmark import run as run_benchmark
    from tessera.bench.kernels.benchmark import KernelBenchmark
    from tessera.bench.kernels.grid import make_cases
    from tessera.commands.backends import model_shapes
    from tessera.runner.device import choose_device

    def shapes() -> Sequence[Shape]:
        return model_shapes(config)[1]

    if config.device.cpu_threads is not None:
        torch.set_num_threads(config.device.cpu_threads)
    device = choose_device(config.device.device)
    cases = make_cases(options, device, shapes, model_named=config.model.model is not None)
    benchmark = KernelBenchmark(
        cases,
        backends=compared,
        device=device.type,
        repeats=options.repeats,
        seed=options.seed,
        ladder=options.ladder,
        profile=options.profile,
    )
    if options.preset in ("decode", "prefill", "vit") and device.type == "cpu":
        sys.stderr.write(f"--preset {options.preset} on a CPU: smaller sizes than on a GPU, named as they are\n")
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.stderr.write("TRITON_INTERPRET=1: our own kernels run in Triton's interpreter, their times say nothing\n")
    rows: list[Record] = run_benchmark(benchmark, path, resume=options.resume)
    if args.json:
        _print_json(rows, benchmark.profiles)
    else:
        _print_tables(rows, benchmark.profiles, ladder=options.ladder)
        sys.stdout.write(f"rows appended to {path}\n")
    kernels = {row.status for row in rows if row.kind == "kernels"}
    return 0 if "ok" in kernels and "failed" not in kernels else 1


def _print_json(rows: Sequence[Record], profiles: Sequence[CallProfile]) -> None:
    from tessera.bench.kernels.profile_tables import profile_json
    from tessera.bench.kernels.tables import as_json

    for line in (*map(as_json, rows), *map(profile_json, profiles)):
        sys.stdout.write(line + "\n")


def _print_tables(rows: Sequence[Record], profiles: Sequence[CallProfile], *, ladder: bool) -> None:
    from tessera.bench.kernels.ladder import ladder_tables
    from tessera.bench.kernels.profile_tables import profile_tables
    from tessera.bench.kernels.tables import tables
    from tessera.commands.table import render

    for table in (*tables(rows), *(ladder_tables(rows) if ladder else ()), *profile_tables(profiles)):
        body = [render(table.rows)] if table.rows else []
        sys.stdout.write("\n".join([table.title, *body, *(f"  {line}" for line in table.lines)]) + "\n\n")
