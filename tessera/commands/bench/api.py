"""Sweep concurrency with short and long prompts, as the article on FlashAttention does, and print its table.

For each level all requests are sent at once. Generation throughput: output tokens of all requests, by the time from
the first sending to the last token. Prompt throughput: prompt tokens of all, by the time from the first sending to the
last first token. TTFT: from the sending of a request to its first token. Network latency, the median of 5 GETs to the
server's root, stands beside them and is taken off nothing.

One server of ours is started for each backend and repeat, with proofs on; flags of the engine are handed on to it.
With --url and without --backends, only the URLs are measured; their key is read from TESSERA_API_KEY. If any request
of a level fails, the level is a failed row.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from tessera.bench.api.options import ApiOptions
from tessera.bench.options import RunOptions, require
from tessera.bench.places import check_file
from tessera.commands.bench.offline import DECIDED
from tessera.commands.flags import Parser, add_model, add_settings, engine_config, read_section
from tessera.commands.table import render
from tessera.config import EngineConfig, settings_of
from tessera.errors import ConfigError

if TYPE_CHECKING:
    from tessera.bench.served.targets import Target


def add_flags(parser: Parser) -> None:
    """The grid, servers, and engine settings."""
    parser.add_argument(
        "--url", action="append", default=[], metavar="NAME=URL", help="A server that runs already; several times."
    )
    add_settings(parser, "api", settings_of(ApiOptions))
    add_settings(parser, "run", settings_of(RunOptions))
    add_model(parser, refused=DECIDED)


def run(args: argparse.Namespace) -> int:
    """Sweep, and print the table; 1 where no level came to its end."""
    options, run_options = read_section(args, ApiOptions), read_section(args, RunOptions)
    config = engine_config(args)
    path = run_options.out_path("api")
    markdown_path, results_path = options.markdown_path(path), options.results_path()
    _ = options.levels, options.lengths
    for module in ("aiohttp", "rich", "yaml"):
        require(module, "bench", "tessera bench api")
    for flag, file in (("--out", path), ("--markdown", markdown_path), ("--results", results_path)):
        if file is not None:
            check_file(flag, file)
    with_own = not args.url or hasattr(args, "backends")
    model, targets = _targets(args, config, options, run_options.backends if with_own else None)

    from tessera.bench.api.benchmark import ApiBenchmark
    from tessera.bench.api.live import run_live
    from tessera.bench.api.tables import markdown, plain, write_results
    from tessera.bench.served.targets import check_names, check_urls

    check_names(targets)
    served = check_urls(targets)
    model = model or served[0]
    benchmark = ApiBenchmark(targets, options, model=model, repeats=run_options.repeats, seed=config.model.seed)
    rows = run_live(benchmark, path, resume=run_options.resume)
    markdown_path.parent.mkdir(parents=True, exist_ok=True)
    markdown_path.write_text(markdown(rows), "utf-8")
    if results_path is not None:
        write_results(results_path, rows)
    sys.stdout.write(render(plain(rows), indent="") + "\n")
    return 0 if any(row.status == "ok" for row in rows) else 1


def _targets(
    args: argparse.Namespace, config: EngineConfig, options: ApiOptions, backends: str | None
) -> tuple[str, list[Target]]:
    """The model that rows name, '' where it is that of the first URL, and the servers."""
    from tessera.bench.served.servers import serve_flags
    from tessera.bench.served.targets import OwnTarget, url_targets

    targets: list[Target] = [*url_targets(args.url)]
    flags = serve_flags(config)
    if backends is None:
        given = [flag for flag in flags if not flag.startswith("--seed=")]
        if given:
            raise ConfigError(
                f"{given[0]} is for a server of ours, and only --url is measured", "add --backends, or leave it out"
            )
        return "", targets
    from tessera.bench.subjects import wanted_backends
    from tessera.commands.backends import model_shapes
    from tessera.model.registry import load_spec
    from tessera.model.source import find_model

    name, shapes = model_shapes(config)
    options.check_context(config.model.max_model_len or load_spec(find_model(config.model)).max_position, name)
    return name, [*(OwnTarget(wanted, flags) for wanted in wanted_backends(backends, shapes)), *targets]
