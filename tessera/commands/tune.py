"""Tune our Triton kernels for this GPU and a model's heads, and keep what is faster than the shipped options.

Tries a few options of tiles, warps, stages and splits beside those that are shipped, each checked before it is timed.
What is found is kept on disk and used by every later start on this device with these heads. What was found before is
shown as it is kept. On a GPU that no shipped table was measured on, a start does this by itself.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from tessera.commands.flags import Parser, add_settings, engine_config
from tessera.commands.table import render
from tessera.config import EngineConfig, section_types, settings_of
from tessera.errors import BackendError
from tessera.log import logger

if TYPE_CHECKING:
    from tessera.attention.contract import Shape
    from tessera.attention.tune import Wanted
    from tessera.attention.tune_store import Found

PHASES = ("prefill", "decode", "vision")
SETTINGS = ("model", "dtype", "device", "page_size", "max_model_len")
"""Those of the engine that decide what is tuned."""


def add_flags(parser: Parser) -> None:
    """The model, and what of it to tune."""
    parser.add_argument("model_word", metavar="MODEL", nargs="?", help="The same as --model.")
    parser.add_argument(
        "--phase", action="append", choices=PHASES, help="Only this phase; may be repeated. Left out: prefill, decode."
    )
    parser.add_argument("--force", action="store_true", help="Search anew what is kept from an earlier search.")
    parser.add_argument("--json", action="store_true", help="One JSON object a search, with everything it tried.")
    sections = section_types(EngineConfig).values()
    settings = [setting for section in sections for setting in settings_of(section) if setting.name in SETTINGS]
    add_settings(parser, "model", settings)


def run(args: argparse.Namespace) -> int:
    """Search what is not kept, keep it, and print both."""
    from tessera.attention import tune
    from tessera.attention.contract import Phase
    from tessera.commands.backends import model_shapes

    config = engine_config(args)
    name, shapes = model_shapes(config)
    phases = [phase for phase in Phase if phase in (args.phase or ("prefill", "decode"))]
    shapes = _with_pages(shapes, phases)
    for phase in phases:
        for reason in dict.fromkeys(why for shape in shapes for why in tune.why_not(phase, shape)):
            logger.info("%s is not tuned: %s", phase, reason)
    results = []
    for wanted in tune.all_wanted(phases, shapes, config.model.max_model_len):
        found = None if args.force else tune.kept(wanted)
        fresh = found is None
        if found is None:
            logger.info("tuning %s, %s: about %.0f s at most", wanted.phase, wanted.part, _seconds(wanted))
            found = tune.search(wanted)
            tune.keep([(wanted, found)])
        results.append((wanted, found, fresh))
        if args.json:
            sys.stdout.write(msgspec.json.encode(_fields(name, *results[-1])).decode() + "\n")
            sys.stdout.flush()
    if not args.json:
        sys.stdout.write(_table(name, shapes[0], results))
    return 0


def _with_pages(shapes: list[Shape], phases: list[Any]) -> list[Shape]:
    """The shapes with the page size that a start would choose for `triton`; refused where it serves none of them."""
    from dataclasses import replace

    from tessera.attention.backends.triton_options import INTERPRETED
    from tessera.attention.choose import choose_page_size

    if shapes[0].device_type == "cpu" and not INTERPRETED:
        raise BackendError(
            "there is nothing to tune on cpu, where our Triton kernels run in Triton's interpreter alone",
            "tune on a machine with a GPU; TRITON_INTERPRET=1 in the environment shows the path, not times",
        )
    page_size = choose_page_size(dict.fromkeys(phases, "triton"), shapes[0].page_size, shapes)
    return [replace(shape, page_size=page_size) for shape in shapes]


def _seconds(wanted: Wanted) -> float:
    from tessera.attention.tune import SEARCH_SECONDS

    return SEARCH_SECONDS[wanted.shape.device_type]


def _table(name: str, shape: Shape, results: list[tuple[Wanted, Found, bool]]) -> str:
    """One row a size, then what was left out."""
    from tessera.attention.kept import device_name

    head = ("phase", "for", "size", "shipped", "ms", "best", "ms", "ratio", "seconds")
    rows, notes = [head], []
    for wanted, found, fresh in results:
        label = str(wanted.part) + (f", window {wanted.shape.window}" if wanted.shape.window else "")
        for size, shipped_ms, best_ms in zip(found.sizes, found.table.times_ms, found.winner.times_ms):
            took = "" if size != found.sizes[0] else f"{found.seconds:.1f}" if fresh else "kept"
            times = (found.table.options.label, f"{shipped_ms:.4f}", found.best.label, f"{best_ms:.4f}")
            rows.append((str(wanted.phase), label, size, *times, f"{best_ms / shipped_ms:.3f}", took))
        part = f"{wanted.phase}, {label}"
        notes += [f"out: {part}: {each.options.label}: {each.problem}" for each in found.trials if each.problem]
        if found.untried:
            notes.append(f"not tried: {part}: candidates that time was too short for: {found.untried}")
    heads = f"{shape.num_q_heads} query and {shape.num_kv_heads} key-value heads of {shape.head_dim}"
    dtype = str(shape.dtype).removeprefix("torch.")
    lines = [f"{name} on {device_name(shape.device_type)}: {heads}, {dtype}, pages of {shape.page_size}", ""]
    return "\n".join([*lines, render(rows, indent="") if results else "nothing to tune", *notes]) + "\n"


def _fields(name: str, wanted: Wanted, found: Found, fresh: bool) -> dict[str, Any]:
    tried: dict[str, Any] = msgspec.to_builtins(found)
    return tried | {
        "model": name,
        "phase": str(wanted.phase),
        "part": str(wanted.part),
        "window": wanted.shape.window,
        "dtype": str(wanted.shape.dtype).removeprefix("torch."),
        "kept": not fresh,
        "shipped": found.table.options.label,
        "chosen": found.best.label,
    }
