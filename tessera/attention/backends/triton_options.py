"""How Triton's kernels are compiled for a shape: tables of tile sizes, cut down to the memory of the device.

The tables hold the winners of docs/results/2026-11-21-h200-triton-prototypes.md where a shape was measured there,
else what fits. Nothing is tuned at run time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from tessera.attention.contract import Phase, Shape

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels in its interpreter: it decides when a kernel is defined, so this never changes."""
LEAST_SHARED_MEMORY = 99 << 10
"""Bytes that a block may ask for on every GPU since Ampere; all options fit into it."""
INTERPRETED_SMS = 32
"""Multiprocessors that the interpreter is taken to have, so that decode is split there too."""


@dataclass(frozen=True)
class Options:
    """How a kernel is compiled; stages are lowered and tiles of keys halved until they fit shared memory."""

    block_m: int
    """Rows a tile, each a query and a head of a group; 0 in DECODE, where the group decides."""
    block_n: int
    """Tokens a tile."""
    num_warps: int
    num_stages: int
    """Tiles of keys and values on their way at a time."""
    programs_per_sm: int = 0
    """DECODE: programs to aim for on a multiprocessor."""
    min_split: int = 0
    """DECODE: fewest tokens a split."""
    balanced_per_sm: int = 0
    """DECODE: programs to aim for where lengths decide how often a sequence is split; 0: all are split alike."""

    def fitted(self, head_bytes: int, shared_memory: int) -> Options:
        """As much of these options as a block has memory for, where a row of a tile takes `head_bytes`."""
        room = shared_memory - self.block_m * head_bytes
        stages = min(self.num_stages, room // (2 * self.block_n * head_bytes))
        if stages >= 2 or self.block_n == 16:
            return replace(self, num_stages=max(1, stages))
        return replace(self, block_n=self.block_n // 2).fitted(head_bytes, shared_memory)

    def arguments(self) -> dict[str, int]:
        """As the kernels take them."""
        rows = {"BLOCK_M": self.block_m} if self.block_m else {}
        return rows | {"BLOCK_N": self.block_n, "NUM_STAGES": self.num_stages, "num_warps": self.num_warps}


_Table = tuple[tuple[int, Options], ...]
"""(largest head_dim, options), ascending."""
HALF: dict[Phase, _Table] = {
    Phase.PREFILL: (
        (64, Options(64, 64, 4, 3)),
        (128, Options(128, 64, 8, 3)),
        (160, Options(64, 64, 4, 3)),
        (256, Options(64, 32, 4, 3)),
    ),
    Phase.DECODE: (
        (64, Options(0, 128, 2, 3, programs_per_sm=8, min_split=128, balanced_per_sm=8)),
        (128, Options(0, 64, 2, 5, programs_per_sm=2, min_split=256, balanced_per_sm=2)),
        (256, Options(0, 32, 4, 5, programs_per_sm=2, min_split=256, balanced_per_sm=4)),
    ),
    Phase.VISION: (
        (64, Options(128, 64, 8, 3)),
        (80, Options(128, 64, 4, 3)),
        (128, Options(128, 64, 8, 3)),
        (160, Options(64, 64, 4, 3)),
        (256, Options(64, 32, 4, 3)),
    ),
}
"""Two bytes a number; in DECODE where sequences alone do not fill the device."""
MANY: _Table = (
    (64, Options(0, 32, 1, 5, programs_per_sm=4, min_split=128, balanced_per_sm=8)),
    (128, Options(0, 32, 1, 4, programs_per_sm=4, min_split=256, balanced_per_sm=8)),
    (256, Options(0, 32, 4, 5, programs_per_sm=2, min_split=256, balanced_per_sm=4)),
)
"""DECODE, two bytes a number, where there are at least `MANY_PER_SM` sequences and key heads a multiprocessor."""
MANY_PER_SM = 2
_FULL_ROWS: _Table = (
    (64, Options(64, 32, 8, 2)),
    (96, Options(32, 32, 8, 2)),
    (128, Options(32, 16, 8, 2)),
    (256, Options(16, 16, 4, 2)),
)
FULL: dict[Phase, _Table] = {
    Phase.PREFILL: _FULL_ROWS,
    Phase.DECODE: ((256, Options(0, 32, 8, 3, programs_per_sm=2, min_split=256, balanced_per_sm=4)),),
    Phase.VISION: _FULL_ROWS,
}
"""float32: multiplied without tensor cores, which would round it."""


def choose_options(phase: Phase, shape: Shape, shared_memory: int) -> Options:
    """How to compile for a shape: by head_dim and dtype alone, so that no answer depends on the batch."""
    table = FULL if shape.dtype == torch.float32 else HALF
    options = next(options for largest, options in table[phase] if shape.head_dim <= largest)
    return options.fitted(_stored_head_dim(phase, shape.head_dim) * shape.dtype.itemsize, shared_memory)


def choose_decode_options(shape: Shape, sms: int, shared_memory: int, num_seqs: int, max_q_len: int = 1) -> Options:
    """How to compile DECODE for so many sequences: whatever their lengths, so that a graph may be replayed with any."""
    options = choose_options(Phase.DECODE, shape, shared_memory)
    if shape.dtype != torch.float32 and num_seqs * shape.num_kv_heads >= MANY_PER_SM * sms:
        many = next(options for largest, options in MANY if shape.head_dim <= largest)
        options = many.fitted(_stored_head_dim(Phase.DECODE, shape.head_dim) * shape.dtype.itemsize, shared_memory)
    # A warp multiplies 16 rows at a time; those of more than one query are more.
    rows = 16 if shape.dtype == torch.float32 else min(64, max_q_len * shape.group)
    return replace(options, num_warps=max(options.num_warps, 1 << (-(-rows // 16) - 1).bit_length()))


def most_decode_parts(shape: Shape) -> int:
    """The most parts of answers that any options for a shape leave behind, a multiprocessor."""
    tables = [FULL[Phase.DECODE]] if shape.dtype == torch.float32 else [HALF[Phase.DECODE], MANY]
    return max(most_parts(next(of for largest, of in table if shape.head_dim <= largest)) for table in tables)


def most_parts(options: Options) -> int:
    """Parts of answers that a multiprocessor's programs leave behind in DECODE; where lengths decide, two each."""
    return max(options.programs_per_sm, 2 * options.balanced_per_sm)


def _stored_head_dim(phase: Phase, head_dim: int) -> int:
    """Numbers that a row takes in shared memory: a power of two in DECODE, elsewhere at most two of them."""
    from tessera.kernels.packed import head_parts

    return 1 << (head_dim - 1).bit_length() if phase is Phase.DECODE else sum(head_parts(head_dim))


def device_resources(shape: Shape) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory a block may ask for) of the device that will run."""
    if shape.device_type != "cuda":
        return INTERPRETED_SMS, LEAST_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    allowed = getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED_MEMORY)
    return properties.multi_processor_count, shape.shared_memory or allowed
