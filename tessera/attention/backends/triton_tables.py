"""The options that are shipped for our Triton kernels, by GPU: data, and where each was measured.

Whoever measures a further GPU adds a `Gpu` to KNOWN, as `tessera tune` prints it. The kernel for Hopper GPUs is not
compiled with any of these: its options stand beside it, in `hopper_options` of kernels/hopper_prefill.py.
"""

from __future__ import annotations

from dataclasses import replace

from tessera.attention.backends.triton_options import Gpu, Options, Tables
from tessera.attention.contract import Phase

MANY_PER_SM = 2
"""Sequences and key heads a multiprocessor from which on DECODE takes `Tables.many`."""
_FULL_ROWS = (
    (64, Options(64, 32, 8, 2)),
    (96, Options(32, 32, 8, 2)),
    (128, Options(32, 16, 8, 2)),
    (256, Options(16, 16, 4, 2)),
)
_H200 = Tables(
    half={
        Phase.PREFILL: (
            (64, Options(64, 64, 4, 3)),
            (128, Options(128, 64, 8, 3)),
            (160, Options(64, 64, 4, 3)),
            (256, Options(64, 32, 4, 3)),
        ),
        Phase.DECODE: (
            (64, Options(0, 64, 2, 4, programs_per_sm=8, min_split=128, balanced_per_sm=8)),
            # With so many stages no third program fits beside two: one of the next launch would stand there early,
            # and the rest of that launch unevenly.
            (128, Options(0, 64, 2, 7, programs_per_sm=2, min_split=256, balanced_per_sm=2)),
            (256, Options(0, 32, 4, 5, programs_per_sm=2, min_split=256, balanced_per_sm=4)),
        ),
        Phase.VISION: (
            (64, Options(128, 64, 8, 3)),
            (80, Options(128, 64, 4, 3)),
            (128, Options(128, 64, 8, 3)),
            (160, Options(64, 64, 4, 3)),
            (256, Options(64, 32, 4, 3)),
        ),
    },
    many=(
        (64, Options(0, 64, 2, 5, programs_per_sm=6, min_split=128, balanced_per_sm=6)),
        # Of one warp each, eight have room with any number of registers.
        (128, Options(0, 32, 1, 4, programs_per_sm=4, min_split=256, balanced_per_sm=8, runs=True)),
        (256, Options(0, 32, 4, 5, programs_per_sm=2, min_split=256, balanced_per_sm=4)),
    ),
    full={
        Phase.PREFILL: _FULL_ROWS,
        Phase.DECODE: ((256, Options(0, 32, 8, 3, programs_per_sm=2, min_split=256, balanced_per_sm=4)),),
        Phase.VISION: _FULL_ROWS,
    },
)
"""The winners where a shape was measured, for heads of 64 to 128 in bfloat16, else what fits into memory."""
KNOWN = (
    Gpu(
        ("H200", "H100"),
        (9, 0),
        (
            "2026-11-21-h200-triton-prototypes.md",
            "2026-11-21-tune.md",
            "2026-11-22-h200-engine.md",
            "2026-11-22-h200-decode-steps.md",
        ),
        _H200,
    ),
)
"""GPUs for which nothing is searched at start; the files say what a search would still win."""
FALLBACK = replace(_H200, many=tuple((largest, replace(options, runs=False)) for largest, options in _H200.many))
"""What any other GPU begins with, as much of it as its shared memory holds; in runs only where their room is known."""
