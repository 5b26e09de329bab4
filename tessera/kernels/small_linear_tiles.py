"""How `small_linear` cuts a weight into programs: one table for each kernel, by the size of the weight and its rows.

What the numbers aim at, on a GPU of 132 multiprocessors that reads 4.4 TB/s about 700 ns after it asks: 3 MB on their
way at any moment, 24 KB a multiprocessor, from at least two programs each, so that one adds up while the other waits.
No program shares its outputs with another: a sum has one order, which is the same in every run.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_ROWS = 256
"""The most rows that `small_linear` multiplies."""
MORE_ROWS = 16
"""The most that one tile of tensor cores' least size serves."""
FEW_ROWS = 4
"""The most that plain multiply-adds serve: from 8 rows on they would take longer than the weight takes to arrive."""
LOADS = {1: 16, 2: 16, 4: 8}
"""Of 16 bytes, that a thread of the kernel for few rows has on their way: 64 of its registers; the sums of 4 rows take
128."""
NUMBERS_PER_WARP = 256
"""Of a weight's row that a warp reads at once: 16 bytes a thread in half types."""
BUSY = 528
"""Four programs a multiprocessor of an H200."""
LINE_BYTES = 128
MOST_STAGES = 8
"""Chunks of a product of many rows that are on their way at once."""
MOST_SHARED = 220_000
"""Bytes of shared memory that they take."""
SHARED_BESIDE = 4096
"""What a kernel needs of it for other things."""
PREFETCH_LINES = 512
"""Of 128 bytes, that a program of the kernel for more rows asks for ahead of its turn: 64 KB."""


class FewRows(NamedTuple):
    """How the kernel for one to four rows is compiled."""

    rows: int
    """Rows it is compiled for, 1, 2 or 4."""
    tile: int
    """Rows of the weight a program."""
    chunk: int
    """Columns of the weight that are loaded at once."""
    held: int
    """Chunks in registers or on their way."""
    num_warps: int


class MoreRows(NamedTuple):
    """How the kernels that use tensor cores are compiled, for up to sixteen rows and for more."""

    rows: int
    """Of x a program."""
    tile: int
    """Rows of the weight a program."""
    chunk: int
    """Columns of the weight in one stage."""
    stages: int
    """Chunks in shared memory or on their way."""
    lines: int
    """Lines of 128 bytes of each row of the weight that are prefetched."""
    num_warps: int


def few_rows_tiles(num_rows: int, num_weight_rows: int, num_inputs: int) -> FewRows:
    """Tiles for one to four rows times a weight [num_weight_rows, num_inputs].

    | inputs       | warps | why                                                                            |
    | ------------ | ----- | ------------------------------------------------------------------------------ |
    | below 1024   | 1     | no sum across warps, no barrier; of 3 chunks 576 waste a quarter, of 1 wide half |
    | below 4096   | 2     | a program holds all its inputs in registers: 6 chunks of 512 are 3072           |
    | from 4096 on | 4     | rows long enough to keep four warps at 4 loads each                             |

    All warps lie along the inputs, and how many depends on the inputs alone, so the order of a sum does too. A program
    takes 4 rows of the weight, as each row of x is read once a program and that is not to be more than the weight;
    for up to 2 rows it takes 2 where 4 would leave less than four programs a multiprocessor.
    """
    num_warps = 1 if num_inputs < 1024 else 2 if num_inputs < 4096 else 4
    rows = 1 if num_rows == 1 else 2 if num_rows == 2 else FEW_ROWS
    tile = 2 if rows <= 2 and num_weight_rows < 4 * BUSY else 4
    chunk = num_warps * NUMBERS_PER_WARP
    chunks = -(-num_inputs // chunk)
    groups = -(-chunks // (LOADS[rows] // tile))
    return FewRows(rows, tile, chunk, -(-chunks // groups), num_warps)


def more_rows_tiles(num_weight_rows: int, num_inputs: int, item_bytes: int) -> MoreRows:
    """Tiles for five to sixteen rows times a weight [num_weight_rows, num_inputs] of numbers of so many bytes.

    | rows of the weight | tile | warps | chunk, half types | stages |
    | ------------------ | ---- | ----- | ----------------- | ------ |
    | below 4224         | 16   | 2     | 256               | 4      |
    | from 4224 on       | 32   | 4     | 128               | 5      |
    | from 16896 on      | 64   | 4     | 128               | 4      |

    A tile of 16 is the least that tensor cores take beside 16 rows, with one warp to each 8 of it. Each program reads
    all of x, so the tile grows as soon as there are two programs a multiprocessor without.
    """
    if num_weight_rows < 8 * BUSY:
        tile, num_warps, chunk, stages = 16, 2, 256, 4
    elif num_weight_rows < 32 * BUSY:
        tile, num_warps, chunk, stages = 32, 4, 128, 5
    else:
        tile, num_warps, chunk, stages = 64, 4, 128, 4
    needed = -(-num_inputs * item_bytes // LINE_BYTES)
    lines = min(1 << (needed - 1).bit_length(), PREFETCH_LINES // tile)
    return MoreRows(MORE_ROWS, tile, chunk * 2 // item_bytes, stages, lines, num_warps)


def many_rows_tiles(num_rows: int, num_inputs: int, *, gated: bool, shared_memory: int) -> MoreRows:
    """Tiles for 17 to 256 rows times a small weight, in half types: the winners of a search on an H200.

    Of the chunks as many are on their way at once as there is memory for, `MOST_STAGES` at most: such a product waits
    for bytes more than it computes.

    | rows       | rows x tile | gated    |
    | ---------- | ----------- | -------- |
    | up to 64   | 64 x 32     | 64 x 64  |
    | up to 128  | 64 x 32     | 128 x 32 |
    | up to 256  | 64 x 64     | 128 x 64 |

    The order in which a sum is added up follows from the inputs alone.
    """
    if gated:
        rows, tile = (64, 64) if num_rows <= 64 else (128, 32) if num_rows <= 128 else (128, 64)
    else:
        rows, tile = (64, 32) if num_rows <= 128 else (64, 64)
    room = min(MOST_SHARED, shared_memory - SHARED_BESIDE)
    wide = num_inputs >= 1024 and num_inputs % 128 == 0 and room >= 4 * 2 * 128 * (rows + tile)
    chunk = 128 if wide else 64
    stages = max(2, min(MOST_STAGES, -(-num_inputs // chunk), room // (2 * chunk * (rows + tile))))
    lines = min(1 << (-(-num_inputs // 64) - 1).bit_length(), PREFETCH_LINES // tile)
    return MoreRows(rows, tile, chunk, stages, lines, 8 if rows * tile >= 128 * 64 else 4)
