"""What a search looks at: candidates beside a table's options, the sizes they are timed in, what they must answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tessera.attention.backends.triton_choice import many_from
from tessera.attention.backends.triton_options import Options, device_resources, head_bytes
from tessera.attention.contract import AttentionBackend, Phase, Shape
from tessera.attention.measure import MAX_POOL_BYTES
from tessera.attention.selftest import self_test_problem
from tessera.attention.step import Bucket
from tessera.attention.tune_store import Part
from tessera.attention.workloads import Workload, make_case

MOST_CANDIDATES = 8
"""Beside the table's: each is compiled in one to three ways of about a second."""
_SIZES = {
    ("cuda", Phase.PREFILL): (Bucket(1, 2048, 2048), Bucket(4, 512, 512)),
    ("cuda", Phase.VISION): (Bucket(1, 1024, 1024), Bucket(8, 256, 256)),
    ("cpu", Phase.PREFILL): (Bucket(1, 20, 20),),
    ("cpu", Phase.VISION): (Bucket(1, 20, 20),),
}
"""Those of DECODE depend on the device and on the heads; on a CPU all are tiny, for the interpreter."""
_DECODE = {"cuda": ((1, 16384), (8, 4096)), "cpu": ((1, 48),)}
_DECODE_MANY = {"cuda": (64, 2048), "cpu": (1, 16)}
"""At least so many sequences, of so many tokens."""

_ROOM = ("block_n", "num_warps", "num_stages", "balanced_per_sm")
"""Options that make programs of a decode larger, or more."""
Step = Mapping[str, Any]
"""Fields of options that a candidate changes, and what to."""


@dataclass(frozen=True)
class Candidate:
    """Options, and the steps that lead to them from the table's."""

    options: Options
    step: Step


def neighbours(phase: Phase, table: Options, shape: Shape) -> list[Candidate]:
    """The options one step away from the table's that fit into memory, at most `MOST_CANDIDATES`, none twice."""
    found: dict[Options, Step] = {}
    for step in _decode_steps(table) if phase is Phase.DECODE else _tile_steps(table):
        options = take(phase, table, step, shape)
        if options is not None and options != table:
            found.setdefault(options, step)
    return [Candidate(options, step) for options, step in found.items()][:MOST_CANDIDATES]


def take(phase: Phase, table: Options, step: Step, shape: Shape) -> Options | None:
    """The table's options after a step, cut down to memory; None where nothing can be compiled like that."""
    # Who knows whether larger programs, or more of them, still have room at once.
    runs = table.runs and not any(step.get(name, 0) > getattr(table, name) for name in _ROOM)
    try:
        options = replace(table, **{"runs": runs, **step})
    except ValueError:
        return None
    return options.fitted(head_bytes(phase, shape), device_resources(shape)[1])


def together(steps: Iterable[Step]) -> Step:
    """All of these steps at once; of those that change the same field the first."""
    taken: dict[str, int] = {}
    for step in steps:
        if not taken.keys() & step.keys():
            taken |= step
    return taken


def _tile_steps(table: Options) -> list[Step]:
    """The most telling first: tiles of keys, warps, tiles of queries with the warps that go with them, stages."""
    return [
        {"block_n": table.block_n * 2},
        {"block_n": table.block_n // 2},
        {"block_m": table.block_m * 2, "num_warps": min(8, table.num_warps * 2)},
        {"block_m": table.block_m // 2, "num_warps": max(1, table.num_warps // 2)},
        {"num_warps": table.num_warps * 2 if table.num_warps < 8 else 4},
        {"num_stages": table.num_stages - 1},
        {"num_stages": table.num_stages + 1},
        {"num_warps": table.num_warps // 2},
    ]


def _decode_steps(table: Options) -> list[Step]:
    """Tiles, warps and programs first: there a GPU with another share of multiprocessors to memory differs most."""
    per_sm, balanced = table.programs_per_sm, table.balanced_per_sm
    return [
        {"block_n": table.block_n * 2},
        {"block_n": table.block_n // 2},
        {"num_warps": table.num_warps * 2},
        {"programs_per_sm": per_sm * 2, "balanced_per_sm": balanced * 2},
        {"programs_per_sm": max(1, per_sm // 2), "balanced_per_sm": max(1, balanced // 2) if balanced else 0},
        {"num_stages": table.num_stages - 1},
        {"num_stages": table.num_stages + 1},
        {"min_split": table.min_split // 2},
    ]


def sizes_of(phase: Phase, part: Part, shape: Shape, max_len: int | None = None) -> list[Bucket]:
    """One or two sizes of step that stand for a part, of no sequence longer than `max_len`."""
    device = shape.device_type
    if phase is not Phase.DECODE:
        sizes = _SIZES[device, phase]
        longest = max_len or max(size.kv_len for size in sizes)
        return list(dict.fromkeys(Bucket(n, min(q, longest), min(kv, longest)) for n, q, kv in sizes))
    first_many = many_from(shape, device_resources(shape)[0])
    decodes: tuple[tuple[int, int], ...] = _DECODE[device]
    if part is Part.MANY:
        least, kv_len = _DECODE_MANY[device]
        decodes = ((max(least, first_many), kv_len),)
    elif part is Part.FEW:
        decodes = tuple((max(1, min(num_seqs, first_many - 1)), kv_len) for num_seqs, kv_len in decodes)
    return list(dict.fromkeys(_that_fits(Bucket(n, 1, min(kv, max_len or kv)), shape) for n, kv in decodes))


def _that_fits(bucket: Bucket, shape: Shape) -> Bucket:
    """As long as its keys and values may be."""
    num_bytes = 2 * bucket.num_seqs * bucket.kv_len * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
    if num_bytes <= MAX_POOL_BYTES[shape.device_type] or bucket.kv_len < 2:
        return bucket
    return _that_fits(bucket._replace(kv_len=bucket.kv_len // 2), shape)


@torch.inference_mode()
def problem_with(backend: AttentionBackend[Any], options: Options) -> str | None:
    """What is wrong with the answers of a backend bound with these options; None if nothing is.

    The self-test's sequences are short: these fill tiles, cut others short, and are split.
    """
    if problem := self_test_problem(backend):
        return problem
    phase, shape = backend.phase, backend.shape
    rows, keys = options.block_m, options.block_n
    lens = {
        Phase.DECODE: ((1, 3 * options.min_split + keys + 9), (1, 5), (1, options.min_split + 1)),
        Phase.PREFILL: ((rows + 5, rows + 2 * keys + 9), (3, keys)),
        Phase.VISION: ((rows + keys + 5,) * 2, (keys, keys)),
    }[phase]
    case = make_case(phase, Workload(lens, shape.window, 0, shape.soft_cap, shape.sinks, shape.causal), shape)
    problems = case.problems(case.answer_of(backend))
    return f"{'; '.join(problems)} (lengths {', '.join(f'{q} of {kv}' for q, kv in lens)})" if problems else None
