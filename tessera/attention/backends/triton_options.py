"""How Triton's kernels are compiled: what options there are, and what of the device they depend on.

`triton_tables.py` holds those that are shipped, `triton_choice.py` says which are taken for a shape.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
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
    """How a kernel is compiled; stages are lowered and tiles of keys halved until they fit shared memory.

    ValueError for what no kernel can be compiled with.
    """

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
    """DECODE: fewest tokens a split, unless multiprocessors would idle."""
    balanced_per_sm: int = 0
    """DECODE: programs to aim for where lengths decide how often a sequence is split; 0: all are split alike."""
    runs: bool = False
    """DECODE: whether sequences are shared out in equal runs of blocks, where they are fewer than 1.5 times those
    programs of a key head: 176 won a little on an H200, 216 lost. All programs must have room on their multiprocessors
    at once: with nine where eight have it a step took a fifth longer."""

    def __post_init__(self) -> None:
        tiles = [self.block_n, *([self.block_m] if self.block_m else [])]
        powers = all(size > 0 and size & (size - 1) == 0 for size in (*tiles, self.num_warps))
        splits = self.block_m > 0 or (min(self.programs_per_sm, self.min_split) > 0 and self.balanced_per_sm >= 0)
        if not (powers and min(tiles) >= 16 and max(tiles) <= 256 and self.num_warps <= 16):
            raise ValueError(f"tiles of {self.block_m} x {self.block_n} by {self.num_warps} warps cannot be compiled")
        if not (1 <= self.num_stages <= 8 and splits):
            raise ValueError(f"{self.num_stages} stages, {self.min_split} tokens a split cannot be compiled")

    @property
    def label(self) -> str:
        """`128x64 w8 s3`: tile, warps, stages; in DECODE `64 w2 s5 p2/2 min256`: programs a multiprocessor too."""
        tile = f"{self.block_m}x{self.block_n}" if self.block_m else str(self.block_n)
        split = f" p{self.programs_per_sm}/{self.balanced_per_sm} min{self.min_split}" if not self.block_m else ""
        return f"{tile} w{self.num_warps} s{self.num_stages}{split}{' runs' if self.runs else ''}"

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


OfHeads = tuple[tuple[int, Options], ...]
"""(largest head_dim, options), ascending."""


@dataclass(frozen=True)
class Tables:
    """Options by head_dim, of one kind of GPU."""

    half: Mapping[Phase, OfHeads]
    """Two bytes a number; in DECODE where sequences alone do not fill the device."""
    many: OfHeads
    """DECODE, two bytes a number, where they do."""
    full: Mapping[Phase, OfHeads]
    """float32: multiplied without tensor cores, which would round it."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU that options were measured on."""

    names: tuple[str, ...]
    """Any of them is a word of what its driver calls it."""
    capability: tuple[int, int]
    measured: tuple[str, ...]
    """Files below docs/results that say how."""
    tables: Tables


def most_parts(options: Options) -> int:
    """Parts of answers that a multiprocessor's programs leave behind in DECODE; where lengths decide, two each."""
    return max(options.programs_per_sm, 2 * options.balanced_per_sm)


def head_bytes(phase: Phase, shape: Shape) -> int:
    """Bytes that a row takes in shared memory: a power of two in DECODE, elsewhere at most two of them."""
    from tessera.kernels.packed import head_parts

    parts = 1 << (shape.head_dim - 1).bit_length() if phase is Phase.DECODE else sum(head_parts(shape.head_dim))
    return parts * shape.dtype.itemsize


def device_resources(shape: Shape) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory a block may ask for) of the device that will run."""
    if shape.device_type != "cuda":
        return INTERPRETED_SMS, LEAST_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    allowed = getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED_MEMORY)
    return properties.multi_processor_count, shape.shared_memory or allowed
