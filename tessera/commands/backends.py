"""List every attention backend and whether it can serve each phase of a model here, or why not."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from tessera.commands.flags import Parser, add_model, engine_config
from tessera.commands.table import render
from tessera.config import EngineConfig

if TYPE_CHECKING:
    from tessera.attention.choose import BackendRow
    from tessera.attention.contract import Shape


def add_flags(parser: Parser) -> None:
    """Output form and engine settings."""
    parser.add_argument("--json", action="store_true", help="One JSON object a backend and phase.")
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    config = engine_config(args)
    name, shapes = model_shapes(config)
    rows = merged_rows(shapes)
    if args.json:
        for row in rows:
            fields = {"backend": row.name, "phase": str(row.phase), "usable": row.usable, "reasons": row.reasons}
            sys.stdout.write(msgspec.json.encode(fields).decode() + "\n")
        return 0
    shape = shapes[0]
    sys.stdout.write(
        f"{name} on {shape.device_type}: {shape.num_q_heads} query and {shape.num_kv_heads} key-value heads "
        f"of {shape.head_dim}, {str(shape.dtype).removeprefix('torch.')}\n\n"
    )
    cells = [(row.name, str(row.phase), "yes" if row.usable else "no", "; ".join(row.reasons)) for row in rows]
    sys.stdout.write(render([("backend", "phase", "usable", "why not"), *cells], indent="") + "\n")
    return 0


def model_shapes(config: EngineConfig) -> tuple[str, list[Shape]]:
    """The model's name, and each shape in which its layers ask for attention; reads no weights."""
    from tessera.attention.contract import Shape
    from tessera.model.registry import load_spec
    from tessera.model.source import find_model
    from tessera.runner.device import capability, choose_device, choose_dtype

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
    )
    return source.name, [replace(shape, window=window) for window in dict.fromkeys(spec.windows)]


def merged_rows(shapes: list[Shape]) -> list[BackendRow]:
    """One row a backend and phase: usable where every shape is, else every reason of any of them."""
    from tessera.attention.choose import BackendRow, backend_rows

    merged = []
    for rows in zip(*(backend_rows(shape) for shape in shapes)):
        reasons = list(dict.fromkeys(reason for row in rows for reason in row.reasons))
        merged.append(BackendRow(rows[0].name, rows[0].phase, not reasons, reasons))
    return merged
