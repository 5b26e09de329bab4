"""Run every benchmark for every usable backend, and turn the rows into one report.

Kernels, offline throughput, a replayed trace, a sweep of concurrency, first-token latency and accuracy, each in a
process of its own; then report.html, report.md and figures in the same folder. Exit code 0: all of them ended well;
130: Ctrl-C ended one and left out the rest, and what is there is reported.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tessera.bench.compare.stages import LEFT_OUT, PARTS, CompareOptions, stages, without_choosers
from tessera.bench.places import check_folder
from tessera.commands.flags import Parser, add_settings, engine_config, read_section
from tessera.config import CacheConfig, DeviceConfig, ModelConfig, settings_of
from tessera.errors import ConfigError

_ENGINE = (
    "model",
    "tokenizer",
    "load_format",
    "dtype",
    "max_model_len",
    "device",
    "cpu_threads",
    "cpu_four_bits",
    "page_size",
)


def add_flags(parser: Parser) -> None:
    """What is compared; of the engine's settings those that all benchmarks can share."""
    parser.add_argument("model_word", metavar="MODEL", nargs="?", help="The same as --model.")
    add_settings(parser, "compare", settings_of(CompareOptions))
    sections = (ModelConfig, DeviceConfig, CacheConfig)
    add_settings(parser, "engine", [s for section in sections for s in settings_of(section) if s.name in _ENGINE])


def run(args: argparse.Namespace) -> int:
    """Run, report, and say where everything is."""
    options, config = read_section(args, CompareOptions), engine_config(args)
    parts = _parts(options)
    folder = _folder(options)
    from tessera.bench.compare.run import INTERRUPTED, make_report, run_stages
    from tessera.bench.options import require
    from tessera.bench.subjects import wanted_backends
    from tessera.commands.backends import model_shapes
    from tessera.runner.device import choose_device

    for module in ("aiohttp", "matplotlib", "rich", "scipy"):
        require(module, "bench", "a comparison")
    name, shapes = model_shapes(config)
    device = choose_device(config.device.device).type
    wanted = wanted_backends(options.backends, shapes)  # refused here, not in six places
    left_out: Mapping[str, str] = {}
    if options.backends in ("usable", "all"):
        wanted = without_choosers(wanted) if device == "cpu" else wanted
        left_out = LEFT_OUT.get((options.effort, device), {})
    options = replace(options, backends=",".join(each.label for each in wanted))
    for part in (part for part in parts if part in left_out):
        sys.stderr.write(f"{part} does without {left_out[part]}, which compiles too long; --backends names it\n")
    outcomes = run_stages(stages(options, parts, device, _given(args), str(folder), left_out), folder)
    code = make_report(folder, f"Attention backends, {name}")
    sys.stdout.write("\n" + "\n".join(outcome.line for outcome in outcomes) + f"\n\nreport: {folder / 'report.html'}\n")
    if any(outcome.code == INTERRUPTED for outcome in outcomes):
        return INTERRUPTED
    return code or int(any(outcome.code for outcome in outcomes))


def _parts(options: CompareOptions) -> list[str]:
    """The benchmarks to run; ConfigError for one that does not exist."""
    if options.only is None:
        return list(PARTS)
    named = [word.strip() for word in options.only.split(",")]
    for word in named:
        if word not in PARTS:
            raise ConfigError(f"--only has {word!r}, which is no benchmark", f"use some of {','.join(PARTS)}")
    return [part for part in PARTS if part in named]


def _folder(options: CompareOptions) -> Path:
    """Where everything goes; ConfigError for one that has rows of another comparison or that cannot be written.

    Also for none to go on with.
    """
    if options.folder is None:
        if options.resume:
            raise ConfigError("--resume goes on with a folder, and none is named", "add --folder")
        folder = Path("results") / f"compare-{time.strftime('%Y%m%dT%H%M%S')}"
        check_folder("the folder", folder)
        return folder
    folder = Path(options.folder)
    has_rows = folder.is_dir() and any(folder.glob("*.jsonl"))
    if has_rows and not options.resume:
        raise ConfigError(f"{folder} has rows already", "add --resume to go on with them, or name another --folder")
    check_folder("--folder", folder)
    return folder


def _given(args: argparse.Namespace) -> dict[str, str | bool]:
    """The engine's settings that were given, by name."""
    given = {name: getattr(args, name) for name in _ENGINE if hasattr(args, name)}
    if getattr(args, "model_word", None) is not None:
        given["model"] = args.model_word
    return {name: value if isinstance(value, bool) else str(value) for name, value in given.items()}
