"""Break first-token latency into four bars: network, a simple kernel, fast kernels, and those with a warm prefix cache.

Network is the round trip of a request that computes nothing. The simple kernel is naive, without a prefix cache. The
fast ones are triton, our Flash-Decoding, where it can serve, else what auto takes: the table names what was proven to
run. The last bar is of prompts that were sent once before, and counts only where the server found them in its cache.
A first token comes from the prefill kernels; a decode kernel takes part only where all but one token was cached.

Each server is started for itself, with proofs on; flags of the engine are handed on to all. A row is the median of
--requests requests, one after another.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from tessera.bench.options import require
from tessera.bench.places import check_file
from tessera.bench.ttft.options import TtftOptions
from tessera.commands.bench.offline import DECIDED
from tessera.commands.flags import Parser, add_model, add_settings, engine_config, read_section
from tessera.commands.table import render
from tessera.config import EngineConfig, settings_of
from tessera.errors import ConfigError

if TYPE_CHECKING:
    from tessera.bench.ttft.bars import Model


def add_flags(parser: Parser) -> None:
    """Prompts, models, and engine settings."""
    parser.add_argument("--json", action="store_true", help="Rows as JSON lines in place of the table.")
    add_settings(parser, "ttft", settings_of(TtftOptions))
    add_model(parser, refused=(*DECIDED, "model", "enable_prefix_caching"))


def run(args: argparse.Namespace) -> int:
    """Measure, and print a table; 1 where no bar came to its end."""
    options, config = read_section(args, TtftOptions), engine_config(args)
    path, names = options.out_path(), options.model_names
    _ = options.lengths
    _refuse_decided(config)
    check_file("--out", path)
    for module in ("aiohttp", "rich"):
        require(module, "bench", "tessera bench ttft")
    from tessera.bench import benchmark
    from tessera.bench.ttft.benchmark import TtftBenchmark
    from tessera.bench.ttft.table import table

    models = [_model(name, config, options) for name in names]
    called = [model.name for model in models]
    if twice := [name for name in called if called.count(name) > 1]:
        raise ConfigError(f"two of --models are called {twice[0]}", "give one of their folders another name")
    rows = benchmark.run(TtftBenchmark(models, options, seed=config.model.seed), path, resume=options.resume)
    if args.json:
        import msgspec

        sys.stdout.writelines(msgspec.json.encode(row).decode() + "\n" for row in rows)
    else:
        sys.stdout.write(render(table(rows), indent="") + "\n")
    return 0 if any(row.status == "ok" and row.subject.resolved for row in rows) else 1


def _refuse_decided(config: EngineConfig) -> None:
    """ConfigError for flags of the engine that the bars decide."""
    from tessera.bench.served.servers import serve_flags

    if config.model.model is not None:
        raise ConfigError(f"--model {config.model.model} is not for this benchmark", "name models with --models A,B")
    if not config.cache.enable_prefix_caching:
        raise ConfigError(
            "--no-enable-prefix-caching is decided by the benchmark, whose last bar needs the cache", "leave it out"
        )
    attention = config.attention
    for name in ("attention", "prefill_attention", "decode_attention"):
        if getattr(attention, name) not in (None, "auto"):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} {getattr(attention, name)} is decided by the benchmark",
                "name it with --fast, for bars three and four",
            )
    serve_flags(config)


def _model(name: str, config: EngineConfig, options: TtftOptions) -> Model:
    """The servers of one of --models; ConfigError where its context is too short."""
    from tessera.bench.served.servers import serve_flags
    from tessera.bench.ttft.bars import Model, stages_of
    from tessera.commands.backends import model_shapes
    from tessera.model.registry import load_spec
    from tessera.model.source import find_model

    section = config.model if name == "default" else replace(config.model, model=name)
    config = replace(config, model=section)
    source_name, shapes = model_shapes(config)
    options.check_context(section.max_model_len or load_spec(find_model(section)).max_position, source_name)
    return Model(source_name, stages_of(source_name, shapes, serve_flags(config), options.fast))
