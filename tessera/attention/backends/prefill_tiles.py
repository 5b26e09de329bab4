"""The tiles of a step's prompts: pieces of so many rows, a row being a query and a head of its group."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.attention.contract import Batch

NO_TILE = 2**20
"""Number of a tile that no sequence has: kernels return at once."""


def list_tiles(batch: Batch, block: int, group: int, *, causal: bool) -> NDArray[np.int32]:
    """[n, 2] (sequence, tile of `block` rows), those that see the most keys first: nobody waits for a late long one.

    group  query heads that share a key head
    """
    q_lens, kv_lens = np.array(batch.q_lens_cpu), np.array(batch.kv_lens_cpu)
    counts = -(-q_lens * group // block)
    seqs = np.repeat(np.arange(len(counts)), counts)
    tiles = np.arange(len(seqs)) - np.repeat(counts.cumsum() - counts, counts)
    num_keys = kv_lens[seqs]
    if causal:
        num_keys = num_keys + np.minimum((tiles + 1) * block // group - q_lens[seqs], 0)
    order = np.argsort(-num_keys, kind="stable")
    return np.stack((seqs[order], tiles[order]), 1).astype(np.int32)


def most_tiles(num_tokens: int, num_seqs: int, block: int, group: int) -> int:
    """How many tiles so many new tokens of so many sequences can have."""
    return num_tokens * group // block + num_seqs


def write_tiles(static: Tensor, tiles: NDArray[np.int32]) -> None:
    """Tiles into the tensor that a graph reads, [n or more, 2], and what is left of it none; the host does not wait."""
    filled = np.full(static.shape, NO_TILE, np.int32)
    filled[:, 0] = 0
    filled[: len(tiles)] = tiles
    source = torch.from_numpy(filled)
    static.copy_(source.pin_memory() if static.is_cuda else source, non_blocking=True)
