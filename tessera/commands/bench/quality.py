"""Accuracy of each attention backend: divergence from a float32 reference, perplexity, and tasks of lm-eval.

Without --lm-eval, the reference is naive in float32 on the same device: it answers prompts greedily; each backend is
led along its answers token by token (KL divergence, logit error), answers freely, and reads a text (perplexity).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, cast, get_args

from tessera.bench.options import RunOptions
from tessera.bench.places import check_file
from tessera.bench.quality.options import QualityOptions
from tessera.commands.bench.offline import DECIDED, refuse_decided
from tessera.commands.flags import Parser, add_model, add_settings, engine_config, read_section
from tessera.commands.table import render
from tessera.config import DTypeName, EngineConfig, settings_of
from tessera.errors import ConfigError

if TYPE_CHECKING:
    from tessera.bench.subjects import Wanted

OF_TASKS = ("lm_eval_path", "lm_eval_python", "lm_eval_transformers", "limit")
OF_SERVING = ("max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching", "chat_template")
"""What decides how requests are scheduled; logits are computed without a scheduler."""
OF_LOGITS = ("prompts", "tokens", "decode_batch", "text", "window", "windows")


def add_flags(parser: Parser) -> None:
    """The subjects, the measurement, and the engine."""
    add_settings(parser, "benchmark", [each for each in settings_of(RunOptions) if each.name != "repeats"])
    add_settings(parser, "quality", settings_of(QualityOptions))
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, append rows, print a table; 1 where nothing could be measured."""
    refuse_decided(args, DECIDED | {"dtype": "use --dtypes"})
    common, options = read_section(args, RunOptions), read_section(args, QualityOptions)
    refuse_idle(args, options)
    path = common.out_path("quality")
    check_file("--out", path)
    config = engine_config(args)
    wanted = _wanted(config, options, common.backends)
    from tessera.bench.benchmark import run as run_benchmark
    from tessera.bench.provenance import provenance

    if options.lm_eval is not None:
        from tessera.bench.quality.lm_eval import LmEvalBenchmark
        from tessera.bench.quality.lm_eval_results import table as task_table

        rows = run_benchmark(LmEvalBenchmark(config, wanted, options, provenance()), path, resume=common.resume)
        lines = task_table(rows)
    else:
        from tessera.bench.quality.benchmark import QualityBenchmark
        from tessera.bench.quality.table import table

        rows = run_benchmark(QualityBenchmark(config, wanted, options, provenance()), path, resume=common.resume)
        lines = table(rows)
    from tessera.bench.reasons import gathered
    from tessera.bench.served.rows import newest

    sys.stdout.write(render(lines, indent="") + "\n")
    sys.stdout.write("".join(f"\n{each.line}" for each in gathered(newest(rows))) + f"\nrows: {path}\n")
    return 0 if any(row.status == "ok" for row in rows) else 1


def refuse_idle(args: argparse.Namespace, options: QualityOptions) -> None:
    """Raise ConfigError for an option that the measurement that was chosen would not look at."""
    idle = (*OF_TASKS, *OF_SERVING) if options.lm_eval is None else OF_LOGITS
    for name in idle:
        if hasattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            if options.lm_eval is None:
                raise ConfigError(
                    f"{flag} is for tasks of lm-eval, and none is named", f"add --lm-eval, or drop {flag}"
                )
            raise ConfigError(f"{flag} means nothing to tasks of lm-eval", f"leave out {flag} or --lm-eval")


def _wanted(config: EngineConfig, options: QualityOptions, backends: str) -> dict[str, list[Wanted]]:
    """The backends to compare in each type, since a type may rule one out."""
    from tessera.bench.offline.target import target_of
    from tessera.bench.subjects import wanted_backends
    from tessera.commands.backends import model_shapes

    known = [name for name in get_args(DTypeName) if name != "auto"]
    names = [target_of(config).dtype] if options.dtypes is None else [w.strip() for w in options.dtypes.split(",")]
    found: dict[str, list[Wanted]] = {}
    for name in names:
        if name not in known or name in found:
            what = "twice" if name in found else "which is no type"
            raise ConfigError(f"--dtypes has {name!r}, {what}", f"use --dtypes {','.join(known)}, or some of them")
        of_type = replace(config, model=replace(config.model, dtype=cast(DTypeName, name)))
        found[name] = wanted_backends(backends, model_shapes(of_type)[1])
    return found
