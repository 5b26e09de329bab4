"""How torch_sdpa divides a step into calls: which tokens, which keys, which mask.

What the constants below were measured for stands in docs/LOG.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from tessera.attention.contract import Batch, Phase, Shape

LENGTH_STEP = 64
"""DECODE reads lengths rounded up to this: sequences of like length share a call, and what one of them
computes does not depend on the others."""
ROW_STEP = 4
"""A call's query rows are rounded up to this where heads share keys: matrix kernels compute four rows in
less time than three, and each thread's scratch memory is aligned alike, without which MKL rounds
differently on one thread than on another."""
GATHER_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Most keys and values one DECODE call gathers, unless one sequence alone is larger: on a CPU what stays in
its cache until it is used, on a GPU a bound on memory that is not pages."""
TILE_ROWS = 256
"""Queries of a sequence that share a mask, where a plain causal call does not serve."""


@dataclass(frozen=True)
class Keys:
    """Where the keys of some sequences lie: `length` tokens of each, counted from the start of a page."""

    pages: Tensor
    """[seqs * pages of each]"""
    num_seqs: int
    length: int
    first_slot: int | None
    """Where the pages of a single sequence follow one another: its first slot, so that nothing is copied."""


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences that are decoded in one call."""

    keys: Keys
    skip: int
    """Keys at the start that no query sees."""
    mask: Tensor | None
    """[seqs, 1, 1, length]: 0 where a token is seen, else -inf; None: each sequence sees all keys after `skip`."""


@dataclass(frozen=True)
class DecodePlan:
    """Sequences by length, in groups."""

    order: Tensor | None
    """[seqs]: rows as the groups want them; None where they stand so already."""
    back: Tensor
    """The inverse of `order`."""
    sizes: list[int]
    groups: list[DecodeGroup]


@dataclass(frozen=True)
class Tile:
    """Queries of one sequence, and the keys that they may see."""

    rows: slice
    keys: slice
    mask: Tensor | None
    """[rows, keys], or torch's own word for the lower right triangle."""
    causal: bool
    """Without a mask: as many queries as keys, causal. Else every query sees every key."""


@dataclass(frozen=True)
class PrefillPart:
    """One sequence of a prefill."""

    keys: Keys
    tiles: list[Tile]


@dataclass(frozen=True)
class VisionRun:
    """Sequences of one length that follow one another: one call."""

    tokens: slice
    length: int


Plan = DecodePlan | list[PrefillPart] | list[VisionRun]


class Planner:
    """Divides batches of one phase and shape, with masks only where the kernel takes them."""

    def __init__(self, phase: Phase, shape: Shape, *, masks: bool) -> None:
        self.shape, self.phase, self._masks = shape, phase, masks
        self._page_size = shape.page_size or 1
        padded = shape.device_type == "cpu" and shape.group > 1
        self.rows = _round_up(shape.group, ROW_STEP) if padded else shape.group
        self._mask = torch.empty(TILE_ROWS, 0)  # rows and columns count back from the last query and key

    def plan(self, batch: Batch) -> Plan:
        """The calls of one step."""
        if self.phase is Phase.VISION:
            return list(_vision_runs(batch))
        return list(self._prefill_parts(batch)) if self.phase is Phase.PREFILL else self._decode_plan(batch)

    def _first_page(self, first_query: int) -> int:
        return self._oldest(first_query) // self._page_size

    def _oldest(self, first_query: int) -> int:
        """The oldest token that a query at this position, or a later one, sees."""
        return 0 if self.shape.window is None else max(0, first_query - self.shape.window + 1)

    def _decode_plan(self, batch: Batch) -> DecodePlan:
        device = batch.page_table.device
        first_pages = [self._first_page(kv_len - 1) for kv_len in batch.kv_lens_cpu]
        spans = [max(1, n - page * self._page_size) for n, page in zip(batch.kv_lens_cpu, first_pages)]
        skips = [self._oldest(n - 1) - page * self._page_size for n, page in zip(batch.kv_lens_cpu, first_pages)]
        groups = self._group_by_length(spans, skips)
        rows = [row for group in groups for row in group]
        order = torch.tensor(rows, device=device)
        span, first_page = (torch.tensor(x, device=device)[order] for x in (spans, first_pages))
        table, at, built = batch.page_table[order], 0, []
        for group in groups:
            part = slice(at, at := at + len(group))
            longest = spans[group[-1]]
            length = _round_up(longest, LENGTH_STEP) if self._masks else longest
            keys = self._keys(table[part], first_page[part, None], longest, length)
            mask = self._decode_mask(span[part, None], length) if self._masks else None
            built.append(DecodeGroup(keys, 0 if self._masks else skips[group[0]], mask))
        sizes = [len(group) for group in groups]
        return DecodePlan(None if rows == sorted(rows) else order, order.argsort(), sizes, built)

    def _group_by_length(self, spans: list[int], skips: list[int]) -> list[list[int]]:
        """Sequences that one call serves, shorter ones first: as many as may be gathered at once.

        On a CPU all of a call round up to one length, and single query rows, which would lie unaligned
        behind one another (see ROW_STEP), have a call each. Without masks all have the very same keys to see.
        """
        shape, on_cpu = self.shape, self.shape.device_type == "cpu"
        token_bytes = 2 * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
        groups: list[list[int]] = []
        last = (0, 0)
        for row in sorted(range(len(spans)), key=lambda row: (spans[row], skips[row])):
            length = _round_up(spans[row], LENGTH_STEP)
            alike = (length, 0) if self._masks else (spans[row], skips[row])
            fits = bool(groups) and (len(groups[-1]) + 1) * length * token_bytes <= GATHER_BYTES[shape.device_type]
            apart = alike != last if on_cpu or not self._masks else False
            if fits and not apart and not (on_cpu and self.rows == 1):
                groups[-1].append(row)
            else:
                groups.append([row])
            last = alike
        return groups

    def _decode_mask(self, span: Tensor, length: int) -> Tensor:
        """What each query sees, where `span` [seqs, 1] keys are its sequence's and the last its own."""
        position = torch.arange(length, device=span.device)
        visible = position < span
        if self.shape.window is not None:
            visible &= position >= span - self.shape.window
        return _additive(visible, self.shape.dtype)[:, None, None]

    def _keys(self, table: Tensor, first_page: Tensor, span: int, length: int) -> Keys:
        """`table` [seqs, pages] and `first_page` [seqs, 1] of sequences that are read together."""
        wanted = first_page + torch.arange(-(-length // self._page_size), device=table.device)
        pages = table.gather(1, wanted.clamp_(max=table.shape[1] - 1))
        first_slot = None
        if len(table) == 1 and table.device.type == "cpu":
            held = pages[0, : -(-span // self._page_size)].tolist()
            if held == list(range(held[0], held[0] + len(held))):
                first_slot = held[0] * self._page_size
        return Keys(pages.flatten(), len(table), length, first_slot)

    def _prefill_parts(self, batch: Batch) -> Iterator[PrefillPart]:
        first_token = 0
        for row, (q_len, kv_len) in enumerate(zip(batch.q_lens_cpu, batch.kv_lens_cpu)):
            first_page = self._first_page(kv_len - q_len)
            first_key = first_page * self._page_size
            page = torch.tensor([[first_page]], device=batch.page_table.device)
            keys = self._keys(batch.page_table[row : row + 1], page, kv_len - first_key, kv_len - first_key)
            yield PrefillPart(keys, self._tiles(q_len, kv_len, first_token, first_key, batch.page_table.device))
            first_token += q_len

    def _tiles(self, q_len: int, kv_len: int, first_token: int, first_key: int, device: torch.device) -> list[Tile]:
        window = self.shape.window
        if window is None or window >= kv_len:
            whole = slice(first_token, first_token + q_len), slice(0, kv_len)
            if not self.shape.causal or q_len == kv_len:
                return [Tile(*whole, None, self.shape.causal)]
            if not self._masks:
                return [Tile(*whole, _lower_right(q_len, kv_len), False)]
        tiles = []
        for start in range(0, q_len, TILE_ROWS):
            num = min(TILE_ROWS, q_len - start)
            first_query = kv_len - q_len + start
            oldest = self._oldest(first_query)
            end = first_query + num
            if self.shape.causal:
                mask = self._tile_mask(num, end - oldest, device)
            else:
                assert window is not None  # without one, a single call serves
                end = min(kv_len, end + window - 1)
                mask = self._band(first_query - oldest, num, end - oldest, window, device)
            rows = slice(first_token + start, first_token + start + num)
            tiles.append(Tile(rows, slice(oldest - first_key, end - first_key), mask, False))
        return tiles

    def _band(self, first_query: int, num_rows: int, num_keys: int, window: int, device: torch.device) -> Tensor:
        """The window to both sides."""
        query = torch.arange(first_query, first_query + num_rows, device=device)[:, None]
        distance = (query - torch.arange(num_keys, device=device)).abs()
        return _additive(distance < window, self.shape.dtype)

    def _tile_mask(self, num_rows: int, num_keys: int, device: torch.device) -> Tensor:
        """The lower right corner of one mask that serves every tile: both ends are the newest token."""
        if self._mask.device != device or self._mask.shape[1] < num_keys:
            query = torch.arange(-TILE_ROWS, 0, device=device)[:, None]
            distance = query - torch.arange(-_round_up(num_keys, 1024), 0, device=device)
            visible = distance >= 0
            if self.shape.window is not None:
                visible &= distance < self.shape.window
            self._mask = _additive(visible, self.shape.dtype)
        corner = self._mask[TILE_ROWS - num_rows :, self._mask.shape[1] - num_keys :]
        # CUDA kernels want it aligned; `contiguous` would leave a corner of one row where it lies.
        return corner if device.type == "cpu" else corner.clone(memory_format=torch.contiguous_format)


def _vision_runs(batch: Batch) -> Iterator[VisionRun]:
    at = 0
    for length, run in groupby(batch.q_lens_cpu):
        tokens = slice(at, at := at + length * sum(1 for _ in run))
        yield VisionRun(tokens, length)


def _lower_right(q_len: int, kv_len: int) -> Tensor:
    # Imported only where it is needed: it takes torch._dynamo along, two seconds.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(q_len, kv_len)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
