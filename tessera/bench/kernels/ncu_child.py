"""`python -m tessera.bench.kernels.ncu_child BACKEND PHASE WORKLOAD`: one backend, one case, few launches, for ncu.

Prints nothing. What is to be counted lies between the start and the stop of CUDA's profiler; before it the same call
compiles and warms up.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from tessera.attention.contract import Phase, Shape
from tessera.attention.registry import load_backend, shape_in
from tessera.bench.kernels.cases import Part, parse_heads, parse_workload
from tessera.bench.kernels.inputs import make_part_inputs
from tessera.runner.device import capability, choose_device, shared_memory

WARM_UP, COUNTED = 2, 2
"""Calls."""


def run(words: Sequence[str]) -> None:
    """Call the backend as `words` say, see `ncu.child_words`."""
    args = _parser().parse_args(words)
    device, (heads,) = choose_device("cuda"), parse_heads(args.heads)
    phase = Phase(args.phase)
    shape = Shape(
        num_q_heads=heads.query,
        num_kv_heads=heads.kv,
        head_dim=heads.dim,
        scale=heads.dim**-0.5,
        dtype=getattr(torch, args.dtype),
        device_type="cuda",
        capability=capability(device),
        page_size=args.page_size,
        window=args.window,
        soft_cap=args.soft_cap,
        shared_memory=shared_memory(device),
    )
    part = Part(phase, parse_workload(args.workload))
    inputs = make_part_inputs(part, shape_in(phase, shape), 1, args.seed)
    q, k, v, _ = inputs.copies[0]
    with torch.inference_mode():
        backend = load_backend(args.backend)(phase, inputs.shape)
        plan = backend.plan(inputs.batch)
        for _ in range(WARM_UP):
            backend.run(plan, q, k, v)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
        for _ in range(COUNTED):
            backend.run(plan, q, k, v)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    for name in ("backend", "phase", "workload"):
        parser.add_argument(name)
    parser.add_argument("--heads", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--window", type=int)
    parser.add_argument("--soft-cap", type=float)
    return parser


if __name__ == "__main__":
    import sys

    run(sys.argv[1:])
