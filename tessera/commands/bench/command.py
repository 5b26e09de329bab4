"""Compare attention backends and engines fairly, from one kernel to a served request.

Every benchmark appends rows to a JSON-lines file: what ran and the proof of it, versions, machine, seed, warm-up,
state of the cache, and the command that repeats it. `tessera bench report` turns rows into a page.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec

from tessera.bench.ending import sigterm_as_ctrl_c
from tessera.commands.flags import Parser
from tessera.errors import ConfigError
from tessera.log import LEVELS

BENCHMARKS = ("kernels", "offline", "online", "api", "ttft", "quality", "compare", "report", "diff")
"""Modules of this package; each has `add_flags(parser)` and `run(args) -> exit code`."""


def add_flags(parser: Parser) -> None:
    """A subcommand for each benchmark."""
    subparsers = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK")
    for name in BENCHMARKS:
        if find_spec(f"{__package__}.{name}") is None:
            continue
        module = import_module(f"{__package__}.{name}")
        text = (module.__doc__ or "").strip()
        benchmark = subparsers.add_parser(name, help=text.splitlines()[0], description=text)
        # Without a default: it would stand in for the level that was given before the benchmark's name.
        benchmark.add_argument("--log-level", choices=LEVELS, default=argparse.SUPPRESS, help="What goes to stderr.")
        benchmark.set_defaults(parser=benchmark)
        module.add_flags(benchmark)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was named."""
    if args.benchmark is None:
        raise ConfigError("no benchmark is named", f"name one of {', '.join(BENCHMARKS)}; see `tessera bench --help`")
    with sigterm_as_ctrl_c():
        code: int = import_module(f"{__package__}.{args.benchmark}").run(args)
    return code
