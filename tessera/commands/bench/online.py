"""Replay a trace of requests against a server per backend, and against any OpenAI-compatible URL.

The loop is open: each request is sent at its time, whatever has become of the others; with --concurrency it is closed,
and so many are on their way. Every server gets the very same requests: random token ids (or words) of the trace's
lengths, greedy, with exactly as many output tokens as the trace says. One of ours is started for each backend and
repeat, with proofs on, and is alone on the machine meanwhile; flags of the engine are handed on to it. With --url and
without --backends, only the URLs are measured; their key is read from TESSERA_API_KEY.
Prompts of a trace of conversations are those that people wrote, but for their first token.

Latencies are per token, also where a server sends several in a chunk: TTFT to the first token, TPOT the mean of the
others, ITL each gap, E2E to the end of the stream. If any request of a replay fails, the replay is a failed row.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.bench.online.options import OnlineOptions
from tessera.bench.options import RunOptions
from tessera.bench.places import check_file
from tessera.commands.bench.offline import DECIDED
from tessera.commands.flags import Parser, add_model, add_settings, engine_config, read_section
from tessera.commands.table import render
from tessera.config import EngineConfig, settings_of
from tessera.errors import ConfigError

if TYPE_CHECKING:
    from tessera.bench.online.trace_prompts import Vocabulary
    from tessera.bench.served.targets import Target
    from tessera.text.tokenizer import Tokenizer


def add_flags(parser: Parser) -> None:
    """What is replayed, against whom, and engine settings."""
    parser.add_argument("--json", action="store_true", help="Rows as JSON lines in place of the table.")
    parser.add_argument(
        "--url", action="append", default=[], metavar="NAME=URL", help="A server that runs already; several times."
    )
    add_settings(parser, "online", settings_of(OnlineOptions))
    add_settings(parser, "run", settings_of(RunOptions))
    add_model(parser, refused=DECIDED)


def run(args: argparse.Namespace) -> int:
    """Replay, and print a table; 1 where no replay came to its end."""
    options, run_options, config = (
        read_section(args, OnlineOptions),
        read_section(args, RunOptions),
        engine_config(args),
    )
    path, scales = run_options.out_path("online"), options.scale_list
    from tessera.bench import benchmark
    from tessera.bench.online.benchmark import OnlineBenchmark, Replay
    from tessera.bench.online.results import table, write_results
    from tessera.bench.served.latency import Promise
    from tessera.bench.served.targets import check_urls

    if config.model.seed < 0:
        raise ConfigError(f"--seed {config.model.seed} is negative, which a trace cannot be made from", "use 0 or more")
    results = path.with_name("online_results.json")
    for flag, file in (("--out", path), ("--out", results), ("--write-trace", options.write_trace)):
        if file is not None:
            check_file(flag, Path(file))
    with_own = not args.url or hasattr(args, "backends")
    targets = _targets(args, config, run_options, with_own)
    tokenizer = _tokenizer(options, config, with_own)
    replay = Replay(
        trace=options.make_trace(config.model.seed, tokenizer.encode if tokenizer else None),
        scales=scales,
        vocabulary=_vocabulary(options, tokenizer),
        case=dict(options.case),
        seed=config.model.seed,
        num_warmup=options.num_warmup,
        promise=Promise(options.slo_ttft_ms, options.slo_tpot_ms),
        timeout_s=options.request_timeout,
        messages=options.chat,
        keep_servers=options.keep_servers,
        concurrency=options.concurrency,
        client_processes=options.client_processes,
    )
    online = OnlineBenchmark(targets, replay, repeats=run_options.repeats)
    check_urls(targets)
    began = time.monotonic()
    rows = benchmark.run(online, path, resume=run_options.resume)
    write_results(results, rows, time.monotonic() - began)
    if args.json:
        import msgspec

        sys.stdout.writelines(msgspec.json.encode(row).decode() + "\n" for row in rows)
    else:
        sys.stdout.write(render(table(rows), indent="") + "\n")
    return 0 if any(row.status == "ok" for row in rows) else 1


def _targets(args: argparse.Namespace, config: EngineConfig, run_options: RunOptions, with_own: bool) -> list[Target]:
    from tessera.bench.served.servers import serve_flags
    from tessera.bench.served.targets import OwnTarget, url_targets
    from tessera.bench.subjects import wanted_backends
    from tessera.commands.backends import model_shapes

    targets: list[Target] = [*url_targets(args.url)]
    flags = serve_flags(config)
    if not with_own:
        prompts_alone = replace(config.model, model=None, tokenizer=None, revision=None, seed=0)
        if flags := serve_flags(replace(config, model=prompts_alone)):
            said = f"{flags[0].partition('=')[0]} is for servers that are started here, and only URLs are measured"
            raise ConfigError(said, "leave it out, or name backends to be measured too with --backends")
        return targets
    _, shapes = model_shapes(config)
    return [*(OwnTarget(wanted, flags) for wanted in wanted_backends(run_options.backends, shapes)), *targets]


def _tokenizer(options: OnlineOptions, config: EngineConfig, with_own: bool) -> Tokenizer | None:
    """The model's own, where its ids are sent or its tokens counted; None where texts are, or no model is named."""
    from tessera.model.source import find_model
    from tessera.text.tokenizer import load_tokenizer

    is_named = with_own or config.model != EngineConfig().model
    if options.needs_tokenizer and not is_named:
        said = f"{options.trace} has texts, whose tokens the tokenizer of the served model counts, and none is named"
        raise ConfigError(said, "add --model, the model that the URL serves")
    if not is_named or (options.sends_text and not options.needs_tokenizer):
        return None
    return load_tokenizer(find_model(config.model), config.model, computes=with_own)


def _vocabulary(options: OnlineOptions, tokenizer: Tokenizer | None) -> Vocabulary:
    """Words where texts were asked for, else the model's own ids; ids that all models have where none is named."""
    from tessera.bench.online.trace_prompts import PLAIN_IDS, Vocabulary

    if options.sends_text:
        return Vocabulary()
    if tokenizer is None:
        return Vocabulary(PLAIN_IDS)
    return Vocabulary([i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_token_ids])
