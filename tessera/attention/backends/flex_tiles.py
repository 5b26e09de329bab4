"""How flex divides a step: queries in tiles of one sequence each, and for each tile the pages that it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from tessera.attention.contract import Batch, Phase, Shape

TILE = 128
"""Queries of a tile, except in DECODE; the rows that one row of a block mask stands for."""
VISION_PAGE = 128
"""Packed keys that one column of a block mask stands for."""
TILES = {"cpu": (8, 8), "cuda": (8, 1 << 20)}
"""Fewest and most tiles of a call. A compilation takes seconds: on a CPU, where it takes most, one count serves
all; on a GPU each power of two is compiled."""


@dataclass(frozen=True)
class Tiles:
    """Queries cut into tiles, and what each tile may see; tensors are int64, padding tiles see one stale key."""

    rows: Tensor
    """[tiles * queries]: the token that each query is; padding repeats token 0."""
    back: Tensor
    """[tokens]: the query that each token is."""
    pages: Tensor
    """[tiles, most pages of a tile]: where the pages of its sequence lie, in the sequence's order."""
    first: Tensor
    """[tiles]: position of the first query in its sequence."""
    kv_len: Tensor
    """[tiles]"""
    skip: Tensor
    """[tiles]: keys in the first page that come before the sequence; 0 outside VISION."""


class Tiler:
    """Cuts batches of one phase and shape into tiles, and builds their block masks."""

    def __init__(self, phase: Phase, shape: Shape) -> None:
        self._phase, self._shape = phase, shape
        self.queries = 1 if phase is Phase.DECODE else TILE
        self.page_size = VISION_PAGE if shape.page_size is None else shape.page_size

    def tiles(self, batch: Batch) -> Tiles:
        """The tiles of a batch, as many as some call is compiled for."""
        rows, back, owner, first = self._cut(batch)
        missing = _padded_count(len(owner), self._shape.device_type) - len(owner)
        device = batch.kv_lens.device
        kv_len = [max(1, batch.kv_lens_cpu[row]) for row in owner] + [1] * missing
        if self._phase is Phase.VISION:
            starts = [sum(batch.q_lens_cpu[:row]) for row in range(len(batch.q_lens_cpu))]
            begin = torch.tensor([starts[row] for row in owner] + [0] * missing, device=device)
            skip, first_page = begin % VISION_PAGE, begin // VISION_PAGE
            pages = first_page[:, None] + torch.arange(-(-max(kv_len) // VISION_PAGE) + 1, device=device)
        else:
            table = batch.page_table[:, : -(-max(kv_len) // self.page_size)].long()
            pages = pad(table[torch.tensor(owner, device=device)], (0, 0, 0, missing))
            skip = torch.zeros(len(kv_len), dtype=torch.int64, device=device)
        return Tiles(
            torch.tensor(rows + [0] * (missing * self.queries), device=device),
            torch.tensor(back, device=device),
            pages,
            torch.tensor(first + [0] * missing, device=device),
            torch.tensor(kv_len, device=device),
            skip,
        )

    def block_masks(self, tiles: Tiles, num_pages: int) -> tuple[BlockMask, ...]:
        """One a call, over a pool of `num_pages`."""
        most = TILES[self._shape.device_type][1]
        return tuple(self._block_mask(part, num_pages) for part in _split(tiles, most))

    def _cut(self, batch: Batch) -> tuple[list[int], list[int], list[int], list[int]]:
        """Tokens by query and queries by token; of each tile, its sequence and the position of its first query."""
        rows: list[int] = []
        back: list[int] = []
        owner, first, token = [], [], 0
        for row, (q_len, kv_len) in enumerate(zip(batch.q_lens_cpu, batch.kv_lens_cpu)):
            for start in range(0, q_len, self.queries):
                num = min(self.queries, q_len - start)
                back += range(len(rows), len(rows) + num)
                rows += [*range(token + start, token + start + num), *[0] * (self.queries - num)]
                owner.append(row)
                first.append(max(0, kv_len - q_len + start))
            token += q_len
        return rows, back, owner, first

    def _block_mask(self, tiles: Tiles, num_pages: int) -> BlockMask:
        """Pages that a tile sees whole need no mask; of those it sees in part, every key is asked for."""
        seen, whole = self._seen_pages(tiles)
        inverse = torch.full((len(seen), num_pages + 1), -1, dtype=torch.int32, device=seen.device)
        order = torch.arange(seen.shape[1], dtype=torch.int32, device=seen.device).expand(seen.shape)
        inverse.scatter_(1, tiles.pages.where(seen, num_pages), order)  # the last column collects what is not seen
        counts, indices = _pack(tiles.pages, seen & ~whole, num_pages)
        full_counts, full_indices = _pack(tiles.pages, whole, num_pages)
        mask: BlockMask = BlockMask.from_kv_blocks(
            counts,
            indices,
            full_counts,
            full_indices,
            BLOCK_SIZE=(TILE, self.page_size),
            mask_mod=_mask_mod(self._shape, self.page_size, tiles, inverse),
            seq_lengths=(self.queries, num_pages * self.page_size),
            compute_q_blocks=False,
        )
        return mask

    def _seen_pages(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """[tiles, pages] bool: pages of which any query of a tile sees a key; those that all queries see whole."""
        first, kv_len, size = tiles.first[:, None], tiles.kv_len[:, None], self.page_size
        last = first + self.queries - 1
        begin = torch.arange(tiles.pages.shape[1], device=first.device) * size - tiles.skip[:, None]
        end = begin + size - 1
        seen, whole = (end >= 0) & (begin < kv_len), (begin >= 0) & (end < kv_len)
        if self._shape.causal:
            seen, whole = seen & (begin <= last), whole & (end <= first)
        if (window := self._shape.window) is not None:
            seen = seen & (first - end < window) & (begin - last < window)
            whole = whole & (last - begin < window) & (end - first < window)
        return seen, whole


def _mask_mod(shape: Shape, page_size: int, tiles: Tiles, inverse: Tensor) -> Callable[..., Tensor]:
    """Whether a query of a tile sees the key in a slot; `inverse` [tiles, pool pages] is a page's place, or -1."""
    first, kv_len, skip = (x.int() for x in (tiles.first, tiles.kv_len, tiles.skip))
    causal, window = shape.causal, shape.window

    def sees(tile: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:  # noqa: ARG001
        place = inverse[tile, slot // page_size]
        position = place * page_size + slot % page_size - skip[tile]
        distance = first[tile] + query - position
        visible = (place >= 0) & (position >= 0) & (position < kv_len[tile])
        if causal:
            visible = visible & (distance >= 0)
        if window is not None:
            visible = visible & (distance < window) & (distance > -window)
        return visible

    return sees


def _pack(pages: Tensor, keep: Tensor, num_pages: int) -> tuple[Tensor, Tensor]:
    """Of each tile the number of pages kept, [tiles, 1, 1], and those pages first, [tiles, 1, 1, num_pages]."""
    indices = torch.zeros(len(pages), num_pages, dtype=torch.int32, device=pages.device)
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    packed = pages.where(keep, 0).gather(1, order)[:, :num_pages]
    indices[:, : packed.shape[1]] = packed
    return keep.sum(1, dtype=torch.int32)[:, None, None], indices[:, None, None]


def _split(tiles: Tiles, most: int) -> Iterator[Tiles]:
    for at in range(0, len(tiles.kv_len), most):
        part = slice(at, at + most)
        yield replace(
            tiles, pages=tiles.pages[part], first=tiles.first[part], kv_len=tiles.kv_len[part], skip=tiles.skip[part]
        )


def _padded_count(num_tiles: int, device_type: str) -> int:
    fewest, most = TILES[device_type]
    if num_tiles > most:
        return -(-num_tiles // most) * most
    return max(fewest, 1 << (num_tiles - 1).bit_length())
