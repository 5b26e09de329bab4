"""torch_sdpa: pages gathered, then torch's scaled_dot_product_attention; the default on a CPU.

The query heads that share a key head are folded into one operand, so keys and values are never
repeated. What the constants below were measured for stands in docs/LOG.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from tessera.attention.contract import AttentionBackend, Batch, Limits, Phase, Shape
from tessera.kernels.pages import gather_pages

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

_LIMITS = Limits(dtypes=(torch.float32, torch.bfloat16, torch.float16), devices=("cpu", "cuda"), windows=True)


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
    mask: Tensor
    """[seqs, 1, 1, length]: 0 where a token is seen, else -inf."""


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
    """[rows, keys]; None: as many queries as keys, causal."""


@dataclass(frozen=True)
class PrefillPart:
    """One sequence of a prefill."""

    keys: Keys
    tiles: list[Tile]


class TorchSdpa(AttentionBackend["DecodePlan | list[PrefillPart]"]):
    """Serves every shape with the fused kernels that torch itself brings."""

    name: ClassVar[str] = "torch_sdpa"
    limits: ClassVar[dict[Phase, Limits]] = {Phase.PREFILL: _LIMITS, Phase.DECODE: _LIMITS}

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        assert shape.page_size is not None
        self._page_size = shape.page_size
        self._group = shape.num_q_heads // shape.num_kv_heads
        padded = shape.device_type == "cpu" and self._group > 1
        self._rows = _round_up(self._group, ROW_STEP) if padded else self._group
        self._buffers = torch.empty(2, 0)  # [2, pages, page_size, kv_heads, head_dim]: what was gathered last
        self._mask = torch.empty(TILE_ROWS, 0)  # rows and columns count back from the last query and key

    def plan(self, batch: Batch) -> DecodePlan | list[PrefillPart]:
        """Group and order the sequences, build index and mask tensors, and grow the gather buffers."""
        if self.phase is Phase.PREFILL:
            prefill = list(self._prefill_parts(batch))
            self._reserve(batch, [part.keys for part in prefill])
            return prefill
        decode = self._decode_plan(batch)
        self._reserve(batch, [group.keys for group in decode.groups])
        return decode

    def run(self, plan: DecodePlan | list[PrefillPart], q: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        """One call a group of sequences in DECODE, one a tile in PREFILL."""
        if isinstance(plan, DecodePlan):
            return self._decode(plan, q, k_pages, v_pages)
        out = q.new_empty(q.shape)
        for part in plan:
            k, v = (x.squeeze(0).transpose(0, 1).unsqueeze(1) for x in self._read(part.keys, k_pages, v_pages))
            for tile in part.tiles:
                self._prefill_tile(tile, q, k, v, out)
        return out

    def _decode(self, plan: DecodePlan, q: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        grouped = q.view(len(q), self.shape.num_kv_heads, self._group, self.shape.head_dim)
        if plan.order is not None:
            grouped = grouped.index_select(0, plan.order)
        if self._rows != self._group:
            grouped = pad(grouped, (0, 0, 0, self._rows - self._group))
        outputs = []
        for group, queries in zip(plan.groups, torch.split(grouped, plan.sizes)):
            k, v = (x.transpose(1, 2) for x in self._read(group.keys, k_pages, v_pages))
            outputs.append(scaled_dot_product_attention(queries, k, v, group.mask, scale=self.shape.scale))
        out = torch.cat(outputs)
        if plan.order is not None:
            out = out.index_select(0, plan.back)
        return out[:, :, : self._group].reshape(q.shape)

    def _prefill_tile(self, tile: Tile, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """k, v  [kv_heads, 1, keys, head_dim]; on a CPU the query heads of a group read them in place."""
        grouped = (-1, self.shape.num_kv_heads, self._group, self.shape.head_dim)
        queries = q[tile.rows].view(grouped).permute(1, 2, 0, 3)
        keys, values = (x[:, :, tile.keys].expand(-1, self._group, -1, -1) for x in (k, v))
        if q.device.type == "cuda":
            # Torch 2.11's memory-efficient kernel, given a mask and heads of stride 0, computes the last row
            # wrong where there are 64 n + 1 queries (docs/LOG.md).
            keys, values = keys.contiguous(), values.contiguous()
        attended = scaled_dot_product_attention(
            queries,
            keys,
            values,
            tile.mask,
            is_causal=tile.mask is None,
            scale=self.shape.scale,
        )
        out[tile.rows].view(grouped).copy_(attended.permute(2, 0, 1, 3))

    def _read(self, keys: Keys, k_pages: Tensor, v_pages: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values, each [seqs, length, kv_heads, head_dim]: in place where possible, else gathered."""
        if keys.first_slot is not None and keys.first_slot + keys.length <= k_pages.shape[0] * self._page_size:
            k, v = (x.flatten(0, 1).narrow(0, keys.first_slot, keys.length)[None] for x in (k_pages, v_pages))
            return k, v
        num_pages = len(keys.pages)
        size = (keys.num_seqs, -1, self.shape.num_kv_heads, self.shape.head_dim)
        k, v = (
            gather_pages(pages, keys.pages, buffer[:num_pages]).view(size)[:, : keys.length]
            for pages, buffer in zip((k_pages, v_pages), self._buffers)
        )
        return k, v

    def _reserve(self, batch: Batch, keys: list[Keys]) -> None:
        """Make the gather buffers hold the largest of `keys`."""
        num_pages = max((len(one.pages) for one in keys), default=0)
        device = batch.page_table.device
        if self._buffers.device != device or self._buffers.shape[1] < num_pages:
            size = (2, num_pages, self._page_size, self.shape.num_kv_heads, self.shape.head_dim)
            self._buffers = torch.empty(size, dtype=self.shape.dtype, device=device)

    def _first_page(self, first_query: int) -> int:
        """The page of the oldest token that a query at this position, or a later one, sees."""
        return 0 if self.shape.window is None else max(0, first_query - self.shape.window + 1) // self._page_size

    def _decode_plan(self, batch: Batch) -> DecodePlan:
        device = batch.page_table.device
        first_pages = [self._first_page(kv_len - 1) for kv_len in batch.kv_lens_cpu]
        spans = [max(1, n - page * self._page_size) for n, page in zip(batch.kv_lens_cpu, first_pages)]
        groups = self._group_by_length(spans)
        rows = [row for group in groups for row in group]
        order = torch.tensor(rows, device=device)
        span, first_page = (torch.tensor(x, device=device)[order] for x in (spans, first_pages))
        table, at, built = batch.page_table[order], 0, []
        for group in groups:
            part = slice(at, at := at + len(group))
            longest = spans[group[-1]]
            length = _round_up(longest, LENGTH_STEP)
            keys = self._keys(table[part], first_page[part, None], longest, length)
            built.append(DecodeGroup(keys, self._decode_mask(span[part, None], length)))
        sizes = [len(group) for group in groups]
        return DecodePlan(None if rows == sorted(rows) else order, order.argsort(), sizes, built)

    def _group_by_length(self, spans: list[int]) -> list[list[int]]:
        """Sequences that one call serves, shorter ones first: as many as may be gathered at once.

        On a CPU all of a call round up to one length, and single query rows, which would lie unaligned
        behind one another (see ROW_STEP), have a call each.
        """
        shape, on_cpu = self.shape, self.shape.device_type == "cpu"
        token_bytes = 2 * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
        groups: list[list[int]] = []
        longest = 0
        for row in sorted(range(len(spans)), key=spans.__getitem__):
            length = _round_up(spans[row], LENGTH_STEP)
            fits = bool(groups) and (len(groups[-1]) + 1) * length * token_bytes <= GATHER_BYTES[shape.device_type]
            if fits and not (on_cpu and (length != longest or self._rows == 1)):
                groups[-1].append(row)
            else:
                groups.append([row])
            longest = length
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
        if q_len == kv_len and (window is None or window >= kv_len):
            return [Tile(slice(first_token, first_token + q_len), slice(0, kv_len), None)]
        tiles = []
        for start in range(0, q_len, TILE_ROWS):
            num = min(TILE_ROWS, q_len - start)
            first_query = kv_len - q_len + start
            end = first_query + num
            oldest = 0 if window is None else max(0, first_query - window + 1)
            rows = slice(first_token + start, first_token + start + num)
            mask = self._tile_mask(num, end - oldest, device)
            tiles.append(Tile(rows, slice(oldest - first_key, end - first_key), mask))
        return tiles

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


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
