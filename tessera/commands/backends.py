"""List every attention backend and whether it can serve each phase of a model here, or why not."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from tessera.commands.flags import Parser, add_model, engine_config
from tessera.commands.table import render, weights_line
from tessera.config import AttentionConfig, EngineConfig
from tessera.log import logger

if TYPE_CHECKING:
    from tessera.attention.contract import Shape
    from tessera.attention.registry import BackendRow


def add_flags(parser: Parser) -> None:
    """Output form and engine settings."""
    parser.add_argument("--json", action="store_true", help="One JSON object a backend and phase.")
    parser.add_argument(
        "--prove", action="store_true", help="Load the model, and list the kernels that the chosen backends run in it."
    )
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    config = engine_config(args)
    if args.prove:
        return _prove(config, args.json)
    from tessera.attention.registry import backend_rows, leftover_warnings

    for warning in leftover_warnings():
        logger.warning("%s", warning)
    name, shapes = model_shapes(config)
    rows = [row for row in backend_rows(shapes) if _is_asked(row, config.attention)]
    if args.json:
        for row in rows:
            fields = {
                "backend": row.name,
                "phase": str(row.phase),
                "usable": row.usable,
                "reasons": row.reasons,
                "notes": row.notes,
            }
            sys.stdout.write(msgspec.json.encode(fields).decode() + "\n")
        return 0
    shape = shapes[0]
    sys.stdout.write(
        f"{name} on {shape.device_type}: {shape.num_q_heads} query and {shape.num_kv_heads} key-value heads "
        f"of {shape.head_dim}, {str(shape.dtype).removeprefix('torch.')}\n\n"
    )
    cells = [
        (row.name, str(row.phase), "yes" if row.usable else "no", "; ".join(row.reasons or row.notes)) for row in rows
    ]
    sys.stdout.write(render([("backend", "phase", "usable", "why not, or how"), *cells], indent="") + "\n")
    return 0


def _is_asked(row: BackendRow, attention: AttentionConfig) -> bool:
    """Whether a row belongs to what --attention and its like name; all do where they name nothing."""
    from tessera.attention.registry import check_name

    named = {
        "prefill": attention.prefill_attention,
        "decode": attention.decode_attention,
        "vision": attention.vision_attention,
    }
    wanted = [name for name in (attention.attention, *named.values()) if name not in (None, "auto")]
    for name in wanted:
        check_name(name)
    return not wanted or row.name in (named[str(row.phase)] or attention.attention,)


def _prove(config: EngineConfig, as_json: bool) -> int:
    """Start the engine with its proofs, which stops where one fails, and print them."""
    from tessera.attention.choose import table_lines
    from tessera.engine.build import build_engine

    config = replace(config, attention=replace(config.attention, prove_attention=True))
    info = build_engine(config, progress=sys.stderr.isatty()).info
    proofs = [(choice, proof) for choice in info.attention for proof in choice.proofs]
    if as_json:
        for choice, proof in proofs:
            fields = msgspec.to_builtins(proof) | {"model": info.model, "dtype": info.dtype, "reason": choice.reason}
            sys.stdout.write(msgspec.json.encode(fields).decode() + "\n")
        return 0
    rows = [("phase", "backend", "step", "share", "calls", "us", "kernel")]
    for _, proof in proofs:
        share = "" if proof.time_share is None else f"{proof.time_share:.1%}"
        for use in proof.symbols:
            times = (str(use.calls), f"{use.microseconds:.0f}", use.name)
            rows.append((proof.phase, proof.backend, proof.step, share, *times))
    versions = {name: version for _, proof in proofs for name, version in proof.versions.items()}
    sys.stdout.write(f"{info.model} on {info.device}, {weights_line(info)}; ")
    sys.stdout.write(", ".join(f"{name} {version}" for name, version in versions.items()) + "\n\n")
    sys.stdout.write(render(rows, indent="") + "\n")
    for choice in info.attention:
        lines = [f"{choice.phase} attention: {', '.join(choice.backends)} ({choice.reason})", *table_lines(choice)]
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    return 0


def model_shapes(config: EngineConfig) -> tuple[str, list[Shape]]:
    """The model's name, and each shape in which its layers ask for attention; reads no weights."""
    from tessera.attention.contract import Shape
    from tessera.model.registry import load_spec
    from tessera.model.source import find_model
    from tessera.runner.device import capability, choose_device, choose_dtype, shared_memory

    source = find_model(config.model)
    spec, device = load_spec(source), choose_device(config.device.device)
    shape = Shape(
        num_q_heads=spec.num_q_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        scale=spec.scale,
        dtype=choose_dtype(config.model.dtype, spec.dtype, device),
        device_type=device.type,
        capability=capability(device),
        page_size=config.cache.page_size,
        shared_memory=shared_memory(device),
    )
    return source.name, [replace(shape, window=window) for window in dict.fromkeys(spec.windows)]
