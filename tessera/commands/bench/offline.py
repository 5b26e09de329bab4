"""Throughput on fixed token ids, across attention backends and other engines.

Every subject is a process of its own and gets the same token ids and the same sampling; they take turns, so that a
drift of the machine meets all of them. Rows go to --out, a summary to offline_results.json beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace

from tessera.bench.offline.options import OfflineOptions
from tessera.bench.options import RunOptions
from tessera.bench.places import check_file
from tessera.commands.flags import Parser, add_model, add_settings, engine_config, read_section
from tessera.commands.table import render
from tessera.config import EngineConfig, SchedulerConfig, settings_of
from tessera.errors import ConfigError

DECIDED = {
    "attention": "name backends with --backends",
    "prefill_attention": "name pairs as --backends PREFILL+DECODE",
    "decode_attention": "name pairs as --backends PREFILL+DECODE",
    "prove_attention": "every backend is proven; leave it out",
}
"""Engine settings that a benchmark over backends decides, and what to say instead."""
_UNREAD = "prompts are token ids: leave it out"
REFUSED = DECIDED | {"tokenizer": _UNREAD, "chat_template": _UNREAD}
DEFAULTS = {
    "enable_prefix_caching": "False, for every pass has the same prompts",
    "max_model_len": "what the longest workload takes",
    "max_num_seqs": f"{SchedulerConfig.max_num_seqs}, or the prompts of the largest workload where they are fewer",
}
"""What is taken for engine settings that are left out, where it is not what the engine takes."""


def add_flags(parser: Parser) -> None:
    """The workload, the subjects, and the engine."""
    add_settings(parser, "benchmark", settings_of(RunOptions))
    add_settings(parser, "offline", settings_of(OfflineOptions))
    add_model(parser, defaults=DEFAULTS, refused=REFUSED)


def run(args: argparse.Namespace) -> int:
    """Measure, append rows, print a table; 1 where nothing could be measured."""
    refuse_decided(args, REFUSED)
    common, options = read_section(args, RunOptions), read_section(args, OfflineOptions)
    path = common.out_path("offline")
    results = path.with_name("offline_results.json")
    for file in (path, results):
        check_file("--out", file)
    config = _config(args)
    from tessera.bench.benchmark import run as run_benchmark
    from tessera.bench.offline.benchmark import OfflineBenchmark
    from tessera.bench.offline.results import of_case, reasons, table, write_results
    from tessera.bench.provenance import provenance
    from tessera.bench.subjects import wanted_backends
    from tessera.commands.backends import model_shapes

    wanted = wanted_backends(common.backends, model_shapes(config)[1])
    benchmark = OfflineBenchmark(config, wanted, options, common.repeats, provenance())
    rows = run_benchmark(benchmark, path, resume=common.resume)
    for case in benchmark.cases:
        about = ", ".join(f"{name} {value}" for name, value in case.items())
        sys.stdout.write(f"{about}\n\n{render(table(of_case(rows, case), benchmark.labels), indent='')}\n\n")
    sys.stdout.write("".join(f"{line}\n" for line in reasons(rows)))
    write_results(results, rows, benchmark.labels)
    sys.stdout.write(f"\nrows: {path}; summary: {results}\n")
    return 0 if any(row.status == "ok" for row in rows) else 1


def _config(args: argparse.Namespace) -> EngineConfig:
    """The engine; the prefix cache is off unless asked for, since every pass has the same prompts."""
    config = engine_config(args)
    if not hasattr(args, "enable_prefix_caching"):
        config = replace(config, cache=replace(config.cache, enable_prefix_caching=False))
    return config


def refuse_decided(args: argparse.Namespace, decided: Mapping[str, str]) -> None:
    """Raise ConfigError for a setting on the command line that the benchmark itself decides."""
    for name, hint in decided.items():
        if hasattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} is decided by this benchmark", hint)
