"""Serve a model over OpenAI's HTTP API."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields, replace

from tessera.commands.flags import Parser, add_model, add_settings, engine_config
from tessera.commands.table import proof_line, render, weights_line
from tessera.config import EngineConfig, ServerConfig, check_section, settings_of
from tessera.errors import ConfigError
from tessera.log import logger
from tessera.types import AttentionChoice, EngineInfo


def add_flags(parser: Parser) -> None:
    """Server and engine settings."""
    add_model(parser)
    add_settings(parser, "server", settings_of(ServerConfig))


def run(args: argparse.Namespace) -> int:
    """Serve until stopped."""
    config, server = _proven(engine_config(args)), server_config(args)
    from tessera.server.run import run_server

    return run_server(config, server, announce, log_level=args.log_level)


def _proven(config: EngineConfig) -> EngineConfig:
    """What is served is proven unless that was forbidden."""
    if config.attention.prove_attention is not None:
        return config
    return replace(config, attention=replace(config.attention, prove_attention=True))


def server_config(args: argparse.Namespace) -> ServerConfig:
    """The server settings given on the command line, and the key from the environment."""
    given = {field.name: getattr(args, field.name) for field in fields(ServerConfig) if hasattr(args, field.name)}
    server = ServerConfig(**given)
    if server.api_key is None:
        server = replace(server, api_key=os.environ.get("TESSERA_API_KEY"))
    if server.api_key == "":  # a secret that expanded to nothing must not open the door
        raise ConfigError("the API key is empty", "give --api-key or TESSERA_API_KEY a value, or neither")
    check_section(server)
    return server


def announce(info: EngineInfo, url: str) -> None:
    """Log what is served, how, and where."""
    logger.info("serving\n%s", render([*describe(info), ("URL", f"{url}/v1")]))


def describe(info: EngineInfo) -> list[tuple[str, str]]:
    """An engine as rows of a table."""
    pages = f"{info.num_pages} of {info.page_size} tokens, {info.num_pages * info.page_size} in all"
    attention = [row for choice in info.attention for row in _attention_rows(choice)]
    return [
        ("model", f"{info.model} ({info.architecture}), loaded in {info.load_seconds:.1f} s"),
        ("weights", weights_line(info)),
        ("device", info.device),
        ("context", f"{info.max_model_len} tokens"),
        ("pages", pages),
        ("step", f"{info.max_num_batched_tokens} tokens, {info.max_num_seqs} sequences at most"),
        *attention,
    ]


def _attention_rows(choice: AttentionChoice) -> list[tuple[str, str]]:
    """The backend of a phase, its proofs, the sizes of step it was measured in, every other and why it is not it."""
    proofs = [("", proof_line(proof)) for proof in choice.proofs]
    buckets = [
        ("", f"{bucket.size}: {bucket.backend}" + (f", then {bucket.runner_up}" if bucket.runner_up else "") + times)
        for bucket in choice.buckets
        for times in (" (ms: " + ", ".join(f"{name} {ms:.3f}" for name, ms in bucket.times_ms.items()) + ")",)
    ]
    names: dict[str, list[str]] = {}
    for name, reasons in choice.rejected.items():
        names.setdefault("; ".join(reasons), []).append(name)
    others = [("", f"not {', '.join(those)}: {reason}") for reason, those in names.items()]  # as many say the same
    return [(f"{choice.phase} attention", f"{choice.backend} ({choice.reason})"), *proofs, *buckets, *others]
